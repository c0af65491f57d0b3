# SPDX-License-Identifier: Apache-2.0
"""The calls of TensorRT against a stand-in that has the documented names and arguments only.

What it builds and launches is computed by ONNX Runtime, at the addresses that it is given; streams
and CUDA graphs of torch are stood in for too. It shows that calls exist, in which order they come
and that failures are reported, not that TensorRT would compute the same. Names and arguments are
those of NVIDIA's bindings, for which see ``ddo_modulus.engines.trt``.
"""

import ctypes
import inspect
import json
import shutil
import sys
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ddo_modulus.engines import trt as module
from ddo_modulus.engines.folder import probes, relative_error
from ddo_modulus.engines.ort import input_sizes
from ddo_modulus.engines.trt import TensorRTEngine, build_plan, require_tensorrt
from ddo_modulus.errors import InputError

VERSIONS = ("10.13.3.9", "11.1.0.106")


def strict(function):
    """Refuse arguments of other types than the annotated ones, as the bindings do."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].annotation
            if kind is not inspect.Parameter.empty and type(value) not in kind:
                raise TypeError(f"{function.__qualname__}: incompatible argument {name}={value!r}")
        return function(*args, **kwargs)

    return call


class HostMemory:
    """Memory of TensorRT; the real one is a buffer, of which ``bytes`` makes a copy likewise."""

    __slots__ = ("_content",)

    def __init__(self, content):
        self._content = content

    def __bytes__(self):
        return self._content


def make_tensorrt(version, state):
    """A module ``tensorrt`` of a version; it notes in ``state`` what it is asked to do."""
    major = int(version.split(".")[0])
    trt = ModuleType("tensorrt")
    trt.__spec__, trt.__version__ = ModuleSpec("tensorrt", None), version

    class DataType(Enum):
        FLOAT, HALF, INT64 = range(3)

    class MemoryPoolType(Enum):
        WORKSPACE = 0

    class BuilderFlag(Enum):
        TF32 = 6

    class NetworkDefinitionCreationFlag(Enum):
        STRONGLY_TYPED = 1 if major == 10 else 0

        def __int__(self):
            return self.value

    class Logger:
        WARNING = 2
        __slots__ = ()

        @strict
        def __init__(self, min_severity: (int,) = 2):
            state.loggers += 1

    class Network:
        __slots__ = ("_model", "_typed")

    class Profile:
        __slots__ = ("_shapes",)

        def __init__(self):
            self._shapes = {}

        @strict
        def set_shape(self, input: (str,), min: (tuple,), opt: (tuple,), max: (tuple,)):
            ordered = all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
            if not ordered:
                raise RuntimeError("Shape provided is inconsistent with other shapes.")
            self._shapes[input] = min, max

    class TimingCache:
        __slots__ = ("_entries",)

        def serialize(self):
            return HostMemory(json.dumps(self._entries).encode())

    class BuilderConfig:
        __slots__ = ("_profiles", "_timings")

        def __init__(self):
            self._profiles, self._timings = [], None

        @strict
        def set_memory_pool_limit(self, pool: (MemoryPoolType,), pool_size: (int,)):
            state.workspace = pool_size

        @strict
        def clear_flag(self, flag: (BuilderFlag,)):
            state.cleared.append(flag.name)

        @strict
        def add_optimization_profile(self, profile: (Profile,)):
            self._profiles.append(profile)
            return len(self._profiles) - 1

        @strict
        def create_timing_cache(self, serialized_timing_cache: (bytes,)):
            timings = TimingCache()
            try:
                timings._entries = json.loads(serialized_timing_cache or b'["this GPU"]')
            except ValueError:
                return None
            return timings

        @strict
        def set_timing_cache(self, cache: (TimingCache,), ignore_mismatch: (bool,)):
            if not ignore_mismatch and cache._entries[0] != "this GPU":
                return False
            self._timings = cache
            return True

    class Builder:
        __slots__ = ()

        @strict
        def __init__(self, logger: (Logger,)):
            pass

        @strict
        def create_network(self, flags: (int,) = 0):
            network = Network()
            typed = 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED.value
            network._model, network._typed = None, major > 10 or bool(flags & typed)
            return network

        def create_builder_config(self):
            return BuilderConfig()

        def create_optimization_profile(self):
            return Profile()

        @strict
        def build_serialized_network(self, network: (Network,), config: (BuilderConfig,)):
            if state.fails == "build" or config._timings is None or not network._typed:
                return None
            (profile,) = config._profiles
            sizes = {v.name: v.type.tensor_type.shape.dim for v in network._model.graph.input}
            for name, dims in sizes.items():
                for size, *ends in zip(dims, *profile._shapes[name], strict=True):
                    if not size.dim_param and ends != [size.dim_value] * 2:
                        return None
            config._timings._entries.append(network._model.graph.name)
            state.builds += 1
            head = json.dumps([version, profile._shapes]).encode()
            return HostMemory(head + b"\0" + network._model.SerializeToString())

    class OnnxParser:
        __slots__ = ("_errors", "_network")

        @strict
        def __init__(self, network: (Network,), logger: (Logger,)):
            self._errors, self._network = [], network

        @strict
        def parse_from_file(self, model: (str,)):
            try:
                self._network._model = onnx.load(model)
            except Exception as error:
                self._errors.append(type(error).__name__)
            return not self._errors

        @property
        def num_errors(self):
            return len(self._errors)

        @strict
        def get_error(self, index: (int,)):
            return self._errors[index]

    class ExecutionContext:
        __slots__ = ("_addresses", "_engine", "_launched", "_shapes")

        def __init__(self, engine):
            self._engine, self._addresses, self._shapes = engine, {}, {}
            self._launched = False

        @strict
        def set_input_shape(self, name: (str,), shape: (tuple,)):
            low, high = self._engine._ends.get(name, ((), ()))
            fits = len(shape) == len(low)
            if not fits or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return False
            self._shapes[name], self._launched = shape, False
            return True

        @strict
        def set_tensor_address(self, name: (str,), memory: (int,)):
            if name not in self._engine._names:
                return False
            self._addresses[name] = memory
            return True

        @strict
        def execute_async_v3(self, stream_handle: (int,)):
            captured = state.captures.get(stream_handle)
            if state.fails == "launch" or set(self._addresses) != set(self._engine._names):
                return False
            if captured is not None and not self._launched:
                return False
            places, shapes = dict(self._addresses), dict(self._shapes)
            launch = lambda: self._engine._compute(places, shapes)  # noqa: E731
            (launch if captured is None else lambda: captured.append(launch))()
            self._launched = True
            state.launches.append((stream_handle, places))
            return True

    class CudaEngine:
        __slots__ = ("_ends", "_names", "_session")

        def __init__(self, ends, model):
            self._ends, self._session = ends, onnxruntime.InferenceSession(model)
            nodes = (*self._session.get_inputs(), *self._session.get_outputs())
            self._names = [node.name for node in nodes]

        def create_execution_context(self):
            state.contexts += 1
            return None if state.fails == "context" else ExecutionContext(self)

        @property
        def num_io_tensors(self):
            return len(self._names)

        @strict
        def get_tensor_name(self, index: (int,)):
            return self._names[index]

        @strict
        def get_tensor_dtype(self, name: (str,)):
            assert name in self._names
            return DataType.HALF if state.fails == "type" else DataType.FLOAT

        def _compute(self, places, shapes):
            feeds = {}
            for name, shape in shapes.items():
                there = (ctypes.c_float * int(np.prod(shape))).from_address(places[name])
                feeds[name] = np.ctypeslib.as_array(there).reshape(shape)
            results = self._session.run(None, feeds)
            for node, result in zip(self._session.get_outputs(), results, strict=True):
                ctypes.memmove(places[node.name], result.tobytes(), result.nbytes)

    class Runtime:
        __slots__ = ()

        @strict
        def __init__(self, logger: (Logger,)):
            if state.fails == "runtime":
                raise TypeError("pybind11::init(): factory function returned nullptr")

        @strict
        def deserialize_cuda_engine(self, serialized_engine: (bytes,)):
            head, _, model = serialized_engine.partition(b"\0")
            if state.fails == "load" or not model or json.loads(head)[0] != version:
                return None
            return CudaEngine(json.loads(head)[1], model)

    trt.float32 = DataType.FLOAT
    for kind in (MemoryPoolType, BuilderFlag, NetworkDefinitionCreationFlag, Logger, Builder):
        setattr(trt, kind.__name__, kind)
    trt.OnnxParser, trt.Runtime = OnnxParser, Runtime
    return trt


def stand_in_for_cuda(monkeypatch, state):
    """What the engine needs of ``torch.cuda``, on a CPU."""

    class Stream(SimpleNamespace):
        def wait_stream(self, other):
            pass

    default = Stream(cuda_stream=0)
    current = [default]

    @contextmanager
    def stream(given):
        current.append(given)
        yield
        current.pop()

    @contextmanager
    def graph(captured, *, capture_error_mode):
        state.captures[9] = captured.launches
        with stream(Stream(cuda_stream=9)):
            yield
        del state.captures[9]

    class CUDAGraph:
        def __init__(self):
            self.launches = []

        def replay(self):
            for launch in self.launches:
                launch()

    gpu = SimpleNamespace(name="Stand-in", major=9, minor=0)
    for name, value in {
        "device": lambda device: nullcontext(),
        "get_device_properties": lambda device: gpu,
        "current_stream": lambda device=None: current[-1],
        "is_current_stream_capturing": lambda: current[-1].cuda_stream in state.captures,
        "Stream": lambda device: Stream(cuda_stream=7),
        "stream": stream,
        "graph": graph,
        "CUDAGraph": CUDAGraph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture(params=VERSIONS)
def stand_in(request, monkeypatch):
    """The module ``tensorrt`` of a version, on a machine that seems to have a GPU."""
    state = SimpleNamespace(
        loggers=0, builds=0, contexts=0, cleared=[], workspace=None, launches=[], captures={}
    )
    state.fails = None
    trt = make_tensorrt(request.param, state)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(module, "require_tensorrt", lambda device: require_tensorrt("cuda"))
    stand_in_for_cuda(monkeypatch, state)
    return SimpleNamespace(trt=trt, state=state)


@pytest.fixture
def opened(stand_in, exported, tmp_path):
    """``opened(name, ...)``: a package and an engine of its graphs, in a folder of the test's."""

    def get(name="box", *, batch=8, **options):
        kept = exported(name)
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(kept.folder, folder)
        options.setdefault("report", lambda line: None)
        return kept.package, TensorRTEngine(kept.package, folder, kept.contract, batch, **options)

    return get


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("name", ["box", "coarse", "linear"])
def test_graphs_are_computed_where_the_tensors_are(name, cuda_graphs, opened, stand_in, vjp):
    package, engine = opened(name, cuda_graphs=cuda_graphs)
    assert stand_in.state.builds == 2 and stand_in.state.cleared == ["TF32"] * 2
    assert stand_in.state.workspace == 4 << 30
    for batch in (1, 7, 7, 11):  # captured, replayed, and more than a plan takes at once
        x, sigma, v, *given = probes(package, package.grid.shape, batch)
        condition = given[0] if given else None
        expected = vjp(package.operator, x, sigma, v, condition)
        found = engine.vjp(x, sigma, v, condition)
        for result, right in zip(found, expected, strict=True):
            assert relative_error(result, right) < 1e-4
        assert relative_error(engine(x, sigma, condition), expected[0]) < 1e-4
    assert stand_in.state.loggers == 1


def test_a_launch_precedes_the_one_that_is_captured(opened, stand_in):
    package, engine = opened()
    assert stand_in.state.contexts == 0
    x, sigma, _, condition = probes(package, package.grid.shape, 3)
    engine(x, sigma, condition)
    (first, where), (second, again) = stand_in.state.launches
    assert (first, second) == (7, 9) and where == again
    engine(x + 1, sigma, condition)
    assert len(stand_in.state.launches) == 2 and stand_in.state.contexts == 1
    for batch in (1, 2, 4, 5, 3):  # the oldest is left, with its context, and made again
        engine(x[:1].expand(batch, -1, -1, -1), sigma[:1].expand(batch), condition[:1])
    assert stand_in.state.contexts == 6


def test_nothing_is_captured_in_a_graph_of_another(opened, stand_in):
    package, engine = opened()
    x, sigma, _, condition = probes(package, package.grid.shape, 3)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="only after another one"),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        engine(x, sigma, condition)


def test_inputs_are_aligned(opened, stand_in):
    package, engine = opened(cuda_graphs=False)
    assert stand_in.state.contexts == 2
    x, sigma, _, condition = probes(package, package.grid.shape, 3)
    several = torch.cat([sigma, sigma])
    shift = next(i for i in range(2) if several[i:].data_ptr() % 256)
    given = several[shift : shift + 3]
    result = engine(x, given, condition)
    ((stream, places),) = stand_in.state.launches
    assert stream == 0 and places["sigma"] != given.data_ptr()
    assert relative_error(result, package.operator(x, given, condition)) < 1e-4


def test_plans_are_used_again(opened, stand_in, tmp_path):
    lines = []
    opened(report=lines.append)
    assert all("there is none yet" in line for line in lines) and len(lines) == 2
    opened(report=lines.append)
    assert len(lines) == 2 and stand_in.state.builds == 2
    plans = tmp_path / "box" / "plans"
    (plans / "denoiser-stand-in-b8.plan").write_bytes(b"of something else")
    opened(report=lines.append)
    assert len(lines) == 3 and "it cannot be read" in lines[2]
    (timed,) = plans.glob("timings-*.cache")
    assert timed.name == f"timings-stand-in-b8-{stand_in.trt.__version__}.cache"
    assert len(json.loads(timed.read_bytes())) == 4


@pytest.mark.parametrize("content", [b"damaged", b'["another GPU"]'])
def test_timings_that_cannot_serve_are_left(content, stand_in, exported, tmp_path):
    kept, timed = exported("box"), tmp_path / "timings.cache"
    graph, sizes = kept.folder / "denoiser.onnx", input_sizes(kept.contract, "denoiser")
    timed.write_bytes(content)
    for count in (1, 2):
        assert build_plan(stand_in.trt, graph, sizes, 4, timed)
        assert json.loads(timed.read_bytes()) == ["this GPU", *["denoiser"] * count]


def test_constants_apart_are_found(stand_in, exported, tmp_path):
    kept = exported("box")
    graph = tmp_path / "denoiser.onnx"
    onnx.save(
        onnx.load(kept.folder / "denoiser.onnx"),
        graph,
        save_as_external_data=True,
        location="denoiser.onnx.data",
        size_threshold=0,
    )
    sizes = input_sizes(kept.contract, "denoiser")
    assert build_plan(stand_in.trt, graph, sizes, 4, tmp_path / "timings.cache")


def test_what_the_parser_says_is_told(stand_in, tmp_path):
    graph = tmp_path / "denoiser.onnx"
    graph.write_bytes(b"no graph")
    with pytest.raises(InputError, match="cannot read .*denoiser.onnx: DecodeError"):
        build_plan(stand_in.trt, graph, {}, 4, tmp_path / "timings.cache")


@pytest.mark.parametrize(
    ("fails", "kind", "words"),
    [
        ("runtime", InputError, "cannot use this GPU or its driver"),
        ("build", InputError, "built no plan of .*smaller batch="),
        ("load", InputError, "cannot load the plan .*smaller batch="),
        ("type", InputError, "inputs or outputs not in fp32"),
    ],
)
def test_failures_to_open_are_told(fails, kind, words, opened, stand_in):
    stand_in.state.fails = fails
    with pytest.raises(kind, match=words):
        opened()


@pytest.mark.parametrize(
    ("fails", "words"), [("context", "made no context"), ("launch", "could not launch")]
)
def test_failures_to_run_are_told(fails, words, opened, stand_in):
    package, engine = opened()
    x, sigma, _, condition = probes(package, package.grid.shape, 3)
    stand_in.state.fails = fails
    with pytest.raises(RuntimeError, match=words):
        engine(x, sigma, condition)
    stand_in.state.fails = None
    with pytest.raises(RuntimeError, match=r"refused x of shape \(9, "):
        engine.run("denoiser", {"x": x[:1].expand(9, -1, -1, -1).contiguous()})
    with pytest.raises(RuntimeError, match="has no tensor other"):
        context = engine._context("denoiser")
        engine._bind(context, {}, {"other": x})


@pytest.mark.parametrize("version", ["9.3.0", "12.0.1"])
def test_other_versions_are_refused(version, stand_in):
    stand_in.trt.__version__ = version
    with pytest.raises(InputError, match=f"10 and 11, not {version}"):
        require_tensorrt("cuda")
