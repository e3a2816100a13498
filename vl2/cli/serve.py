"""`vl2 serve`: a bundle behind an OpenAI-compatible HTTP interface, with a page to try it."""

import logging
from pathlib import Path
from typing import Any

import click

from vl2.cli.options import (
    ByteSize,
    bundle_options,
    cache_options,
    debug_option,
    max_tiles_option,
    open_as_asked,
)
from vl2.errors import VL2Error

_LIMITS = {"max_body": "body_bytes", "max_pixels": "pixels", "max_images": "images", "max_new_tokens": "new_tokens",
           "max_queued": "queued", "max_queued_per_client": "queued_per_client", "request_seconds": "request_seconds"}


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond loopback with tokens only.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="What clients call the model; the bundle's name without it.")
@click.option("--token-file", type=click.Path(path_type=Path),
              help="Bearer tokens, one a line; or one in VL2_SERVE_TOKEN. Without both, all users of this machine may "
              "ask.")
@click.option("--allow-remote-images", "image_hosts", multiple=True, metavar="HOST",
              help="Fetch https images from this host; may be given several times. Never from private addresses.")
@click.option("--image-root", type=click.Path(path_type=Path), help="Read image files below this folder.")
@click.option("--allow-host", "host_names", multiple=True, metavar="NAME",
              help="Answer to this name in the Host header too, where no token guards; may be given several times.")
@click.option("--max-body", type=ByteSize(), default="20MB", show_default=True,
              help="Of a request, and of a fetched or read image.")
@click.option("--max-pixels", type=click.IntRange(min=1), default=50_000_000, show_default=True,
              help="Of all images of a request.")
@click.option("--max-images", type=click.IntRange(min=1), default=8, show_default=True, help="A request.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=2048, show_default=True,
              help="The most that a request may ask for.")
@click.option("--max-queued", type=click.IntRange(min=1), default=32, show_default=True, help="Requests that may wait.")
@click.option("--max-queued-per-client", type=click.IntRange(min=1), default=8, show_default=True,
              help="Of them, of one client: a token at an address.")
@click.option("--request-seconds", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
              help="From a request's whole body to its last token.")
@click.option("--batch", type=click.IntRange(1, 8), default=4, show_default=True,
              help="Answers that are computed at once, their tokens together, where the bundle has the lowering cpu; "
              "each is the one that it would be alone.")
@click.option("--kv-cache", type=ByteSize(), default="512MiB", show_default=True,
              help="For conversations that are kept to go on with; those used longest ago go first.")
@cache_options
@max_tiles_option
@bundle_options
@debug_option
def command(bundle: Path, host: str, port: int, **choices: Any) -> None:
    """Serve BUNDLE: OpenAI's /v1/chat/completions, /metrics, and a page at /.

    Ends on SIGTERM or Ctrl-C, after the running answer or ten seconds.
    """
    try:
        from vl2.runtime.serve.server import listen, serve
        from vl2.runtime.serve.tokens import read_tokens
    except ModuleNotFoundError as error:
        raise VL2Error(f"serving needs the package {error.name}, which is not installed",
                       "pip install '.[serve]' in vl2's folder") from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    tokens = read_tokens(choices.pop("token_file"))
    settings = _settings(bundle, tokens, choices)
    # First what can be refused at once, then what takes time.
    with listen(host, port, tokens) as listening:
        model = open_as_asked(bundle, choices)
        for graph in ("decoder", "vision"):
            model.engine.backend.load(graph)
        where = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        guard = f"{len(tokens)} tokens" if tokens else "no token, this machine only"
        serve(model, settings, listening, lambda: click.echo(f"serving {settings.name} at {where} ({guard})", err=True))


def _settings(bundle: Path, tokens: tuple[str, ...], choices: dict[str, Any]) -> Any:
    """ServeSettings; takes what it needs out of `choices`."""
    from vl2.runtime.serve.settings import Limits, ServeSettings

    limits = Limits(**{field: choices.pop(option) for option, field in _LIMITS.items()})
    name = choices.pop("name") or bundle.resolve().name.removesuffix(".bundle")
    return ServeSettings(name, tokens, frozenset(choices.pop("image_hosts")), choices.pop("image_root"),
                         frozenset(map(str.lower, choices.pop("host_names"))), limits, choices.pop("batch"))
