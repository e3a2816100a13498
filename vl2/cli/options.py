"""Options that several verbs share, and what the runtime makes of them."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from vl2.backends import AUTO, BACKENDS, DEVICES
from vl2.errors import VL2Error


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(dict)["debug"] = True


debug_option = click.option("--debug", is_flag=True, expose_value=False, callback=_remember_debug,
                            help="Show the traceback of an error.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")

_GENERATION = (
    click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True,
                 help="Stop after this many tokens."),
    click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
                 help="0 is greedy. The original's inference.py samples with 0.4."),
    click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True,
                 help="Nucleus sampling; the original's inference.py uses 0.9."),
    click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
                 help="Over prompt and answer, as the original does; its inference.py uses 1.1."),
    click.option("--stop", multiple=True, help="Stop before this string; may be given several times."),
    click.option("--seed", type=click.IntRange(min=0), help="Makes sampling repeatable."),
    click.option("--frequency-penalty", type=float, default=0.0, show_default=True,
                 help="Taken from a token's logit for each time it is in the answer."),
    click.option("--presence-penalty", type=float, default=0.0, show_default=True,
                 help="Taken from a token's logit once it is in the answer."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the end token, for measurements; the repetition guard "
                 "is then off."),
    click.option("--no-repetition-guard", is_flag=True, help="Let an answer go on that repeats one block of tokens 6 "
                 "times in a row, over 256 tokens or more."),
    click.option("--boxes", is_flag=True, help="Let the answer hold boxes in their right form only: "
                 "<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], …]<|/det|>."),
    click.option("--regex", metavar="PATTERN", help="The whole answer matches this regular expression."),
    click.option("--json-schema", type=click.Path(path_type=Path), metavar="FILE",
                 help="The answer is JSON of the schema in this file, on one line."),
    click.option("--prefill-chunk", type=click.IntRange(min=1), default=512, show_default=True,
                 help="Prompt tokens a prefill step takes; less needs less memory."),
)

_BUNDLE = (
    click.option("--backend", type=click.Choice([AUTO, *BACKENDS]), default=AUTO, show_default=True,
                 help="What runs the bundle; auto takes the first that works here and says which: engines of TensorRT "
                 "(trt) or TensorRT-RTX (trt-rtx), which `vl2 engine` builds, ONNX Runtime on CUDA, and on the CPU."),
    click.option("--device", type=click.Choice(list(DEVICES)), default=AUTO, show_default=True,
                 help="cpu is short for --backend ort-cpu, cuda for --backend ort-cuda."),
    click.option("--no-cuda-graph", is_flag=True, help="Engines: launch the kernels of a decode step one by one."),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; one a physical core without it."),
    click.option("--no-hash-check", is_flag=True, help="Check only the sizes of the bundle's files."),
    click.option("--no-memory-check", is_flag=True, help="Open a bundle larger than the available memory."),
)

max_tiles_option = click.option("--max-tiles", type=click.IntRange(min=1),
                                help="At most so many tiles an image, its global view on top: less time and memory, "
                                "less detail. Without it the original's rule, up to 9 in the published models.")


def generation_options(command: Callable) -> Callable:
    """Adds the options of generation to a verb; it receives them as keyword arguments."""
    return _with_options(command, _GENERATION)


def bundle_options(command: Callable) -> Callable:
    """Adds the options of opening a bundle to a verb; it receives them as keyword arguments."""
    return _with_options(command, _BUNDLE)


def _with_options(command: Callable, options: tuple) -> Callable:
    for option in reversed(options):
        command = option(command)
    return command


def open_as_asked(bundle: Path, values: dict[str, Any]) -> Any:
    """The runtime's Model of a bundle; takes the keyword arguments of `bundle_options` out of `values`."""
    from vl2.cli.progress import ByteProgress
    from vl2.runtime import BundleOptions, open_bundle

    hashes, memory = not values.pop("no_hash_check"), not values.pop("no_memory_check")
    with ByteProgress() as progress:
        options = BundleOptions(**to_backend_options(values), check_hashes=hashes, check_memory=memory,
                                progress=progress, max_tiles=values.pop("max_tiles", None), **_cache_sizes(values))
        model = open_bundle(bundle, options)
    click.echo(f"backend: {model.backend}", err=True)
    return model


def to_backend_options(values: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of BundleOptions that say what runs a bundle; takes them out of `values`."""
    graph = not values.pop("no_cuda_graph")
    return {**{name: values.pop(name) for name in ("backend", "device", "threads")}, "cuda_graph": graph}


def to_generation_options(values: dict[str, Any]) -> Any:
    """GenerationOptions of the runtime; takes the keyword arguments of `generation_options` out of `values`."""
    from vl2.runtime import GenerationOptions

    guard, constraint = not values.pop("no_repetition_guard"), _constraint(values)
    given = {field.name: values.pop(field.name) for field in fields(GenerationOptions) if field.name in values}
    return GenerationOptions(**{**given, "stop": tuple(given["stop"])}, repetition_guard=guard, constraint=constraint)


def _constraint(values: dict[str, Any]) -> Any:
    """The Constraint of the runtime, None without one; takes its options out of `values`."""
    from vl2.runtime import Constraint

    boxes, regex, schema = values.pop("boxes"), values.pop("regex"), values.pop("json_schema")
    if boxes + (regex is not None) + (schema is not None) > 1:
        raise click.UsageError("Give one of --boxes, --regex and --json-schema.")
    if schema is not None:
        try:
            return Constraint("json_schema", schema.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise VL2Error(f"the schema `{schema}` cannot be read: {error}",
                           "give a file with a JSON schema") from error
    if regex is not None:
        return Constraint("regex", regex)
    return Constraint("boxes") if boxes else None


class ByteSize(click.ParamType):
    """A size such as `4GB`, `500 MB` or `1.5GiB`, in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(value).strip(), re.IGNORECASE)
        if match is None or float(match[1]) == 0:
            self.fail(f"{value!r} is no size, expected such as 4GB", param, ctx)
        return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


class Share(click.ParamType):
    """A share such as `5%` or `0.05`."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", str(value).strip())
        share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
        if not 0 <= share <= 1:
            self.fail(f"{value!r} is no share, expected such as 5%", param, ctx)
        return share


# The schemes of built-in recipes and the methods, by name; a test compares them with `vl2.quant`.
RECIPES = ("int8", "int4", "int4-g64", "int4-g128")
METHODS = ("rtn", "search", "awq", "awq+search", "gptq", "gptq+search", "awq+gptq")
_OUTER = click.Choice(["fp16", "int8"])


class SchemeName(click.ParamType):
    """One of `names`, or the path of a recipe file."""

    name = "scheme"

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names)}|RECIPE.json]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.names and not str(value).endswith(".json"):
            self.fail(f"{value!r} is not one of {', '.join(self.names)}, nor a recipe file (.json)", param, ctx)
        return value


_CACHE = (
    click.option("--cache", type=click.Path(path_type=Path), metavar="DIR",
                 help="Keep encoded images in this folder: the next question about one, from this or another process, "
                 "does not run the vision tower."),
    click.option("--cache-size", type=ByteSize(), metavar="SIZE", default="1GiB", show_default=True,
                 help="Of the files in --cache; images used longest ago go first."),
)


def cache_options(command: Callable) -> Callable:
    """Adds the cache of encoded images to a verb; `open_as_asked` takes its options out of the keyword arguments."""
    return _with_options(command, _CACHE)


def _cache_sizes(values: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of BundleOptions, where the verb has the options; takes them out of `values`."""
    names = {"cache": "cache_dir", "cache_size": "cache_dir_bytes", "kv_cache": "kv_cache_bytes"}
    found = {field: values.pop(option, None) for option, field in names.items()}
    return {field: value for field, value in found.items() if value is not None}


_SAMPLING = (
    click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True,
                 help="At most so many conversations, chosen by --seed."),
    click.option("--tokens", type=click.IntRange(min=1), default=32768, show_default=True,
                 help="At most so many tokens together, those of images included."),
    click.option("--tolerate", type=Share(), default="5%", show_default=True,
                 help="Stop when more of the rows are bad."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses the sample."),
)
max_ram_option = click.option("--max-ram", type=ByteSize(), metavar="SIZE",
                              help="Refuse to begin when calibration or quantization needs more memory, such as 4GB.")
_QUANTIZATION = (
    click.option("--method", type=click.Choice(METHODS), help="How codes are found; without it awq+gptq where there is "
                 "calibration, search where there is none."),
    click.option("--vision", type=_OUTER, help="How the vision tower is stored; fp16 without it."),
    click.option("--head", type=_OUTER, help="How lm_head is stored; fp16 without it."),
    click.option("--embeddings", type=_OUTER, help="How the token embeddings are stored; fp16 without it."),
    click.option("--budget", type=ByteSize(), metavar="SIZE", help="In place of --scheme: measure how much each group "
                 "of matrices suffers and choose the recipe that loses least in this size, such as 2.3GB. What "
                 "--vision, --head and --embeddings leave out is chosen too."),
)


def sampling_options(command: Callable) -> Callable:
    """Adds the options of choosing calibration data; `to_data_options` takes them out of the keyword arguments."""
    return _with_options(command, _SAMPLING)


def quantization_options(command: Callable) -> Callable:
    """Adds the options of quantizing; `to_quantize_options` takes them out of the keyword arguments."""
    return _with_options(command, _QUANTIZATION)


def to_data_options(values: dict[str, Any]) -> Any:
    """DataOptions of calibration."""
    from vl2.calib.data import DataOptions

    return DataOptions(samples=values.pop("samples"), max_tokens=values.pop("tokens"),
                       tolerate=values.pop("tolerate"), seed=values.pop("seed"))


def outer_parts(values: dict[str, Any]) -> dict[str, str]:
    """What the user decided on vision, lm_head and embeddings, by the names of OuterParts; takes it out of `values`."""
    given = {"vision": values.pop("vision"), "lm_head": values.pop("head"), "embeddings": values.pop("embeddings")}
    return {name: value for name, value in given.items() if value is not None}


def to_quantize_options(values: dict[str, Any], scheme: str, calibrated: bool) -> Any:
    """QuantizeOptions of a scheme or recipe file."""
    from vl2.quant.method import DEFAULT_METHOD
    from vl2.quant.quantizer import QuantizeOptions
    from vl2.quant.recipe import OuterParts

    outer = outer_parts(values)
    method = values.pop("method") or (DEFAULT_METHOD if calibrated else "search")
    return QuantizeOptions(recipe=scheme, outer=OuterParts(**outer), method=method)
