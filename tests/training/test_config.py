# SPDX-License-Identifier: Apache-2.0
import pytest

from ddo_modulus.cli.main import compose
from ddo_modulus.errors import InputError
from ddo_modulus.training import TrainerConfig


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"precision": "fp8"}, "trainer.precision=fp8 must be one of fp32, bf16, fp16"),
        ({"optimizer": "sgd"}, "trainer.optimizer=sgd must be one of auto, adamw, apex"),
        ({"compile": "fast"}, "trainer.compile=fast must be one of false, true, max-autotune"),
        ({"cuda_graph": "never"}, "trainer.cuda_graph=never must be one of auto, false, true"),
        ({"compile": 1}, "trainer.compile=1 must be one of"),
        ({"figure": "no"}, "trainer.figure=no must be one of false, true"),
        ({"steps": 0}, "trainer.steps=0 must be a whole number, at least 1"),
        ({"steps": "many"}, "trainer.steps=many must be a whole number"),
        ({"steps": True}, "trainer.steps=True must be a whole number"),
        ({"batch": 0}, "trainer.batch=0 must be a whole number, at least 1"),
        ({"accumulate": 0}, "trainer.accumulate=0 must be a whole number, at least 1"),
        ({"validate_every": 0}, "trainer.validate_every"),
        ({"keep_checkpoints": 0}, "trainer.keep_checkpoints=0 must be a whole number, at least 1"),
        ({"warmup": -1}, "trainer.warmup=-1 must be a whole number, at least 0"),
        ({"learning_rate": "1e-3x"}, "trainer.learning_rate=1e-3x must be a number"),
        (
            {"learning_rate": float("nan")},
            "trainer.learning_rate=nan must be a finite number, above 0",
        ),
        ({"ema": 0}, "trainer.ema=0 must be a finite number, above 0"),
        ({"weight_decay": -0.1}, "trainer.weight_decay=-0.1 must be a finite number, at least 0"),
        ({"sigma_min": 90.0}, "sigma_min must be positive and below sigma_max"),
        ({"sigma_min": 0.0}, "sigma_min must be positive and below sigma_max"),
        ({"loggers": "wandb"}, "trainer.loggers must be a list"),
        (
            {"loggers": ["paper"]},
            "unknown logger 'paper' in trainer.loggers; choose of tensorboard",
        ),
    ],
)
def test_mistakes(options, match):
    with pytest.raises(InputError, match=match):
        TrainerConfig(**options)


def test_the_command_line_has_the_same_defaults():
    config = compose("train", ["experiment=uk_t2m", "out=x", "data.path=x"]).trainer
    plain = TrainerConfig()
    assert set(config) == set(vars(plain))
    experiment = {"steps", "batch", "learning_rate", "precision", "whitening", "sigma_min"}
    experiment |= {"sigma_max", "validate_every", "keep_best", "weight_decay"}
    for key in set(config) - experiment:
        assert config[key] == (list if key == "loggers" else type(config[key]))(getattr(plain, key))
