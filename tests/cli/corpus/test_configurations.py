# SPDX-License-Identifier: Apache-2.0
"""Command lines and configurations: keys, types, ranges, syntax."""

import pytest

from ddo_modulus.cli.configuration import compose
from ddo_modulus.cli.main import COMMANDS, main
from ddo_modulus.cli.schema import SCHEMA
from ddo_modulus.errors import InputError
from ddo_modulus.training.recipe import Recipe

NEEDED = {
    "simulate": ["trajectories=1", "frames=1", "out=x"],
    "prepare": ["source=x", "out=x"],
    "train": ["experiment=uk_t2m", "data.path=x", "out=x"],
    "generate": ["package=uk_t2m", "out=x"],
    "assimilate": ["package=uk_t2m", "observations=x", "out=x"],
    "export": ["package=uk_t2m", "out=x"],
    "verify": ["out=x"],
    "animate": ["out=x"],
    "benchmark": ["package=uk_t2m"],
}

COUNT, SEED, TRUTH = "a whole number", "a whole number from 0 to", "one of false, true"
A, G, B, T = "assimilate", "generate", "benchmark", "train"

# Command, argument, and what the refusal says beside the key and the value.
CASES = [
    # Whole numbers.
    *((A, f"ensemble={v}", COUNT) for v in ("0", "-1", "1e9", "1.5", "two", "true", "null", "nan")),
    (A, "ensemble=1000000000", "from 1 to 100000"),
    *((A, f"seed={v}", SEED) for v in ("1.5", "-1", "x", "9223372036854775808", "null")),
    *((A, f"batch={v}", COUNT) for v in ("0", "2.5", "many")),
    *((A, f"posterior.steps={v}", COUNT) for v in ("0", "-3", "2.5", "x", "1e9", "inf")),
    *((A, f"posterior.iterations={v}", COUNT) for v in ("0", "x", "5000")),
    *((G, f"{key}=0", COUNT) for key in ("steps", "ensemble", "batch", "frames")),
    *((G, f"{key}=-1", COUNT) for key in ("steps", "seed", "data.trajectory")),
    *((B, f"{key}=0", COUNT) for key in ("ensemble", "analyses", "steps", "repeats")),
    (B, "ensemble=[]", "at least one value"),
    (B, "precision=[fp32,fp8]", "one of fp32"),
    *(("simulate", f"{key}=0", COUNT) for key in ("frames", "trajectories", "batch")),
    *(("animate", f"{key}=0", COUNT) for key in ("members", "every", "frames")),
    ("verify", "resamples=1", "from 2"),
    ("verify", "octaves=0", COUNT),
    ("prepare", "statistics.spectrum=-1", COUNT),
    # Numbers.
    *((G, f"sigma_max={v}", "number, above 0 and up to") for v in ("inf", "nan", "-1", "0", "x")),
    *((G, f"sigma_min={v}", "number, above 0 and up to") for v in ("inf", "nan", "-1", "0", "1e9")),
    *((G, f"rho={v}", "number, above 0") for v in ("nan", "0", "-7", "inf", "1e30")),
    *((A, f"inflation={v}", "number from 0.01 to 100") for v in ("1e10", "0", "-1", "nan", "lots")),
    (A, "inflation=null", "'adaptive'"),
    *((A, f"background_length={v}", "number, above 0") for v in ("0", "-5", "nan", "inf", "x")),
    *((A, f"gross_error={v}", "number, above 0") for v in ("0", "-1", "nan", "inf", "x")),
    *((A, f"thinning.km={v}", "number, above 0") for v in ("0", "nan", "near")),
    *((A, f"superob.km={v}", "number, above 0") for v in ("-3", "inf")),
    *((A, f"lapse_rate={v}", "number from -0.05 to 0.05") for v in ("6.5", "nan", "x")),
    *((A, f"default_error={v}", "number, above 0") for v in ("0", "-1", "nan", "inf", "x", "true")),
    *((A, f"background_error={v}", "number, above 0") for v in ("0", "inf", "x")),
    (B, "error=0", "number, above 0"),
    ("animate", "fps=nan", "number, above 0"),
    ("verify", "largest_wavenumber=-2", "number, above 0"),
    # Choices and truth values.
    *((c, "overwrite=maybe", TRUTH) for c in NEEDED),
    (G, "frozen=1", TRUTH),
    (T, "half=2", TRUTH),
    ("export", "external=no-way", TRUTH),
    (A, "posterior.solver=rk4", "one of euler"),
    (A, "posterior.covariance=full", "one of jacobian"),
    (A, "duplicates=drop", "one of keep"),
    (A, "missing=guess", "one of error"),
    (A, "precision=fp8", "one of fp32"),
    (G, "discretization=ddim", "one of edm"),
    ("export", "precision=fp64", "one of fp32"),
    # Paths.
    *((A, f"{key}=", "is empty") for key in ("package", "observations", "out", "background")),
    *((A, f"{key}=[a,b]", "a path or a name") for key in ("out", "package")),
    (A, "observations=null", "a path or a name"),
    (G, "out={a:1}", "a path or a name"),
    (G, "package=true", "a path or a name"),
    ("export", "out='   '", "is empty"),
]


@pytest.mark.parametrize(("command", "argument", "words"), CASES, ids=lambda v: str(v)[:40])
def test_a_value_out_of_range_is_named_with_its_key_and_range(command, argument, words):
    key = argument.partition("=")[0]
    with pytest.raises(InputError, match=words) as caught:
        compose(command, [*NEEDED[command], argument])
    line = str(caught.value)
    assert line.startswith(f"{key}=") and "\n" not in line


def test_a_wrong_error_is_named_by_its_variable():
    with pytest.raises(InputError, match=r"default_error\.z500=-1 must be"):
        compose(A, [*NEEDED[A], "default_error={t2m:0.5,z500:-1}"])


@pytest.mark.parametrize(
    ("command", "argument", "words"),
    [
        (A, "+new=1", "unknown key 'new'"),
        (A, "++new=1", "unknown key 'new'"),
        (A, "+posterior.stepz=3", "did you mean posterior.steps?"),
        (A, "ensamble=3", "did you mean ensemble?"),
        (A, "posterior.iteration=3", "did you mean posterior.iterations?"),
        (G, "sigma_mx=3", "did you mean sigma_max?"),
        (T, "trainer.learn_rate=3", "did you mean trainer.learning_rate?"),
        (T, "+trainer.pace=3", "unknown key 'trainer.pace'"),
        (A, "~seed", "is not of the form key=value|cannot be removed"),
        (A, "~seed=0", "cannot be removed"),
        (A, "posterior=kalman", "choose one of moment_matching"),
        (T, "experiment=uk_t2n", "choose one of"),
        (T, "operator=vit", "choose one of unet"),
        ("simulate", "simulator=euler", "choose one of"),
        (A, "--ensemble=3", "is not of the form key=value"),
        (A, "-n", "is not of the form key=value"),
        (A, "ensemble", "is not of the form key=value"),
        (A, "ensemble:3", "is not of the form key=value"),
        (A, "=3", "is not of the form key=value"),
        (A, "", "is not of the form key=value"),
        (A, "ensemble 3", "is not of the form key=value"),
        (A, "größe=3", "unknown key 'größe'|is not of the form"),
        (A, "hydra.run.dir=x", "an option of sweeps"),
        (A, "ensemble=${seeds}", "seeds"),
        (A, "posterior.steps.more=3", "posterior.steps"),
        (A, "ensemble=(3", "ensemble='?\\(3'? must be"),
        (A, "ensemble='3", "ensemble='?'3'? must be|ensemble=\\S+ must be"),
        (A, "default_error={t2m:", "default_error=\\S+ must be"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_an_argument_that_is_no_key_or_no_value(command, argument, words, capsys):
    assert main([command, *NEEDED[command], argument]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    with pytest.raises(InputError, match=words):
        raise InputError(lines[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["asimilate"], "unknown command 'asimilate'; did you mean assimilate?"),
        (["trian", "out=x"], "did you mean train?"),
        (["Ä"], "unknown command 'Ä'; choose one of"),
        (["generate"], "generate needs out=... package=..."),
        (["assimilate", "out=x"], "assimilate needs observations=... package=..."),
        (["generate", "-m", "package=x"], "-m is for `ddo train`"),
    ],
)
def test_a_command_that_cannot_run(arguments, words, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddo: ") and words in line


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("trainer.learning_rate=nan", "trainer.learning_rate=nan must be a finite number, above 0"),
        ("trainer.sigma_max=inf", "trainer.sigma_max=inf must be a finite number, above 0"),
        ("trainer.sigma_min=90", "sigma_min must be positive and below sigma_max"),
        ("trainer.seed=1.5", "trainer.seed=1.5 must be a whole number"),
        ("trainer.batch=1e3", "trainer.batch=1000.0 must be a whole number"),
        ("trainer.clip=-1", "trainer.clip=-1 must be"),
        ("trainer.loggers=paper", "trainer.loggers must be a list"),
        ("data.frames=0", "data.frames=0 must be"),
        ("data.workers=-1", "data.workers=-1 must be"),
        ("data.prefetch=0", "data.prefetch=0 must be"),
        ("data.memory=nan", "data.memory=nan must be"),
        ("data.start=soon", "data.start=soon is no date"),
        ("data.region=[nan,1]", "data.region="),
        ("normalization.harmonics=40", "normalization.harmonics=40 must be"),
        ("normalization.per_hour=often", "normalization.per_hour=often must be"),
        ("prior.floor=nan", "prior.floor=nan must be"),
        ("prior.kind=magic", "prior.kind=magic must be one of"),
        ("prior.folds=-1", "prior.folds=-1 must be"),
        ("prior.hybrid.weight=nan", "a weight in 0..1"),
        ("prior.hybrid.taper_km=inf", "positive lengths"),
        ("operator.noise.length_scale=0", "operator.noise.length_scale=0 must be"),
        ("operator.noise.smoothness=nan", "operator.noise.smoothness=nan must be"),
        ("operator.network_sigma=-1", "operator.network_sigma=-1 must be"),
        ("operator.regression=2", "operator.regression=2 must be"),
        ("sampling.rho=nan", "rho=nan must be"),
        ("sampling.sigma_max=inf", "sigma_max=inf must be"),
        ("sampling.steps=0", "steps=0 must be"),
    ],
)
def test_options_of_training(argument, words):
    config = compose(T, [*NEEDED[T], argument])
    from ddo_modulus.cli.options import plain

    with pytest.raises(InputError) as caught:
        Recipe.of(plain(config))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"time": "2019-03-27", "step": "6h"}, "either time, or start, end and step"),
        ({"step": "6h"}, "a step needs start and end"),
        ({"thinning__km": 5, "superob__km": 5}, "either thinned or averaged"),
        ({"background_error": 1}, "give background as well"),
        ({"posterior__guidance_interval": "[9,1]"}, "posterior.guidance_interval=[9, 1] must be"),
        ({"posterior__guidance_interval": "[nan,1]"}, "must be two noise levels"),
        ({"posterior__guidance_interval": "[inf,inf]"}, "must be two noise levels"),
        ({"tolerance": "soon"}, "tolerance=soon is no duration"),
        ({"grid__spacing": "[nan,1]"}, "is no region"),
        ({"device": "gpu9"}, "device=gpu9"),
        ({"engine": "jax"}, "jax"),
    ],
)
def test_options_of_an_analysis_that_contradict_each_other(keys, words, files, refusal):
    refusal(A, words, package=files.package, observations=files.table, **keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sigma_min": 9, "sigma_max": 3}, "must be below sigma_max"),
        ({"churn__amount": -1}, "churn=-1"),
        ({"churn__noise": "nan"}, "churn.noise=nan must be"),
        ({"churn__amount": 3}, "churn is for solver=euler or heun"),
        ({"frames": 2, "time": "2019-03-27"}, "either time or frames"),
        ({"resolution": "[1,9]"}, "resolution=[1, 9] must be"),
        ({"time": "noon"}, "time=noon is no time"),
    ],
)
def test_options_of_draws_that_contradict_each_other(keys, words, files, refusal):
    refusal(G, words, package=files.package, **{"time": "2019-03-27", **keys})


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("out=2019", "out", "2019"),
        ("out='a b'", "out", "a b"),
        ("out=a[1],b", "out", "a[1],b"),
        ("out=größe.zarr", "out", "größe.zarr"),
        ("+ensemble=3", "ensemble", 3),
        ("inflation=2", "inflation", 2),
        ("gross_error=null", "gross_error", None),
        ("default_error={t2m:0.5}", "default_error", {"t2m": 0.5}),
    ],
)
def test_values_that_look_wrong_and_are_not(argument, key, value):
    assert compose(A, [*NEEDED[A], argument])[key] == value


def test_every_command_has_rules_and_its_defaults_follow_them():
    assert set(SCHEMA) == set(COMMANDS)
    for command, needed in NEEDED.items():
        compose(command, needed)


def test_few_steps_warn_and_are_noted(files, accepted, caplog):
    keys = {"package": files.package, "observations": files.table, "ensemble": 1}
    store, _ = accepted(A, posterior__steps=4, **keys)
    assert "steps=4: the spread of draws is" in store.attrs["notes"]
    assert "steps=4: the spread of draws is" in caplog.text
