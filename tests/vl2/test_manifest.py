import dataclasses
import json
import os
from pathlib import Path

import pytest

from vl2.errors import VL2Error
from vl2.file_hashes import REMEMBERED_FROM_BYTES, HashCache
from vl2.manifest import (
    SCHEMA_VERSION,
    CachePorts,
    Embeddings,
    Graph,
    ImageFacts,
    LanguageFacts,
    Manifest,
    ModuleFacts,
    Port,
    Source,
    StoredTensor,
    TokenIds,
    check_files,
    file_facts,
    read_manifest,
    write_manifest,
)

FILES = {"vision.onnx": b"v", "vision.data": b"vv", "decoder.onnx": b"d", "decoder.data": b"dd",
         "embeddings.safetensors": b"e"}


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    write_manifest(folder, make_manifest(folder))
    return folder


def make_manifest(folder: Path) -> Manifest:
    tiles = Port("tiles", "float32", ("tiles", 3, 384, 384))
    features = Port("image_features", "float32", ("tiles", 196, 96))
    embeds = Port("inputs_embeds", "float32", ("batch", "tokens", 96))
    past = Port("past_key.0", "float32", ("batch", "past", 6, 16))
    new = Port("new_key.0", "float32", ("batch", "tokens", 6, 16))
    return Manifest(
        vl2_version="0.1.0", variant="custom", scheme="fp32", source=Source("tiny-mini", {"model.safetensors": "00"}),
        image=ImageFacts(384, 14, 2, 14, ((384, 384), (768, 384)), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "head"),
        language=LanguageFacts(96, 640, 1, "mha", 4096), tokens=TokenIds(0, 1, 2, 620),
        graphs={"vision": Graph("vision.onnx", "vision.data", (tiles,), (features,)),
                "decoder": Graph("decoder.onnx", "decoder.data", (embeds, past), (new,),
                                 (CachePorts("past_key.0", "new_key.0"),))},
        embeddings=Embeddings("embeddings.safetensors", {"embed_tokens": StoredTensor("F32", (640, 96))}),
        files={name: file_facts(folder / name) for name in FILES},
        modules={"vision": ModuleFacts(10, 40)}, tools={"python": "3.11"}, conversion={}, verify={"status": "skipped"},
    )


def edit(bundle: Path, change) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_manifest_of_before_quantization_still_opens(bundle: Path) -> None:
    edit(bundle, lambda content: [content.pop(key) for key in LATER])
    manifest = read_manifest(bundle)
    assert (manifest.lowering, manifest.quantization, manifest.mode) == ("portable", None, "exact")


def test_facts_of_the_quantization_survive_writing_and_reading(bundle: Path) -> None:
    facts = {"recipe": {"name": "int4", "rules": []}, "method": "rtn", "calibration": None, "forms": {"experts": {}}}
    manifest = dataclasses.replace(make_manifest(bundle), lowering="ort", quantization=facts)
    write_manifest(bundle, manifest)
    assert read_manifest(bundle) == manifest


def test_a_manifest_survives_writing_and_reading(bundle: Path) -> None:
    manifest = make_manifest(bundle)
    assert read_manifest(bundle) == manifest
    assert json.loads((bundle / "manifest.json").read_text()) == manifest.to_dict()
    assert sorted(path.name for path in bundle.iterdir()) == sorted([*FILES, "manifest.json"])


def test_a_whole_bundle_passes_and_progress_reaches_the_total(bundle: Path) -> None:
    reports = []
    check_files(bundle, read_manifest(bundle), lambda *report: reports.append(report))
    total = sum(map(len, FILES.values()))
    assert reports[-1] == ("checking files", total, total)


def test_a_newer_schema_asks_for_an_update(bundle: Path) -> None:
    edit(bundle, lambda content: content.update(schema_version=SCHEMA_VERSION + 1, future="anything"))
    with pytest.raises(VL2Error, match="schema_version is 3, this vl2 reads up to 2") as error:
        read_manifest(bundle)
    assert "update" in error.value.hint


@pytest.mark.parametrize("version", [0, -1, "1", None, True, 1.0])
def test_an_unknown_schema_version_is_refused(bundle: Path, version: object) -> None:
    edit(bundle, lambda content: content.update(schema_version=version))
    with pytest.raises(VL2Error, match="schema_version"):
        read_manifest(bundle)


# Keys that bundles of before quantization do not have.
LATER = ("lowering", "quantization", "mode", "engines")


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Manifest) if f.name not in LATER])
def test_every_missing_key_is_named(bundle: Path, field: str) -> None:
    edit(bundle, lambda content: content.pop(field))
    with pytest.raises(VL2Error, match=field):
        read_manifest(bundle)


@pytest.mark.parametrize("place, value, message", [
    (("image", "tile_size"), "384", "image.tile_size is '384', expected int"),
    (("image", "image_mean"), [0.5, 0.5], "image.image_mean"),
    (("graphs", "decoder", "inputs", 0, "shape"), "dynamic", r"inputs\[0\].shape"),
    (("graphs", "decoder", "cache", 0, "past"), "past_value.0", "does not list 'past_value.0'"),
    (("graphs", "vision", "data_file"), "other.data", "does not list 'other.data'"),
    (("language", "colour"), 1, "unknown key 'colour'"),
    (("files", "vision.onnx", "size_bytes"), True, "size_bytes is True, expected int"),
    (("tokens",), [], "tokens is .*, expected an object"),
])
def test_a_wrong_value_is_named_with_its_place(bundle: Path, place: tuple, value: object, message: str) -> None:
    def change(content):
        for step in place[:-1]:
            content = content[step]
        content[place[-1]] = value

    edit(bundle, change)
    with pytest.raises(VL2Error, match=message):
        read_manifest(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "", ".", "C:\\x", "..\\x", "a\nb",
                                  "manifest.json"])
def test_a_file_name_that_leaves_the_bundle_is_refused(bundle: Path, name: str) -> None:
    def change(content):
        content["files"][name] = content["files"].pop("vision.data")
        content["graphs"]["vision"]["data_file"] = name

    edit(bundle, change)
    with pytest.raises(VL2Error, match="not a plain name") as error:
        read_manifest(bundle)
    assert error.value.hint


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match="not a bundle") as error:
        read_manifest(tmp_path)
    assert "vl2-export" in error.value.hint
    with pytest.raises(VL2Error, match="is not a folder"):
        read_manifest(tmp_path / "nothing")


def test_a_broken_manifest_is_refused(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(VL2Error, match="cannot be read as JSON"):
        read_manifest(bundle)
    (bundle / "manifest.json").write_text("[]")
    with pytest.raises(VL2Error, match="expected a JSON object"):
        read_manifest(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "decoder.data").unlink()
    with pytest.raises(VL2Error, match=r"decoder\.data is missing; the manifest lists it with 2 bytes"):
        check_files(bundle, read_manifest(bundle))


def test_a_file_of_another_size_is_named(bundle: Path) -> None:
    (bundle / "decoder.data").write_bytes(b"ddd")
    with pytest.raises(VL2Error, match=r"decoder\.data has 3 bytes, expected 2"):
        check_files(bundle, read_manifest(bundle))


def test_a_changed_byte_is_found(bundle: Path) -> None:
    (bundle / "decoder.data").write_bytes(b"dx")
    with pytest.raises(VL2Error, match=r"decoder\.data has sha256 .*, expected .*content was changed"):
        check_files(bundle, read_manifest(bundle))


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    with path.open("wb") as stream:
        stream.truncate(REMEMBERED_FROM_BYTES)
    return path


def remembered(path: Path) -> list[str]:
    return list(json.loads(path.read_text()).values()) if path.exists() else []


def test_a_big_file_is_hashed_once_until_it_changes(tmp_path: Path, big_file: Path) -> None:
    store = tmp_path / "cache" / "sha256.json"
    first = HashCache(store)
    expected = first.sha256_of(big_file)
    first.save()
    assert remembered(store) == [expected]
    (key,) = json.loads(store.read_text())
    store.write_text(json.dumps({key: "remembered"}))
    assert HashCache(store).sha256_of(big_file) == "remembered"
    os.utime(big_file, ns=(1, 1))
    assert HashCache(store).sha256_of(big_file) == expected


def test_small_files_are_not_remembered(tmp_path: Path, big_file: Path) -> None:
    store = tmp_path / "cache.json"
    cache = HashCache(store)
    os.truncate(big_file, REMEMBERED_FROM_BYTES - 1)
    cache.sha256_of(big_file)
    cache.save()
    assert remembered(store) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "7"])
def test_a_broken_hash_cache_counts_as_empty(tmp_path: Path, big_file: Path, content: str) -> None:
    store = tmp_path / "cache.json"
    store.write_text(content)
    cache = HashCache(store)
    expected = cache.sha256_of(big_file)
    cache.save()
    assert remembered(store) == [expected]


def test_an_unwritable_hash_cache_does_no_harm(tmp_path: Path, big_file: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = HashCache(tmp_path / "file" / "cache.json")
    assert len(cache.sha256_of(big_file)) == 64
    cache.save()
