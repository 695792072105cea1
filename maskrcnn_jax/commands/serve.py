"""Answer HTTP requests with what a model finds, and show a page on which images can be dropped.

    maskrcnn-jax serve --workdir=runs/r50 --checkpoint=best
    maskrcnn-jax serve --weights=torchvision:maskrcnn_resnet50_fpn_v2 --port=8080

    curl --data-binary @photo.jpg "http://127.0.0.1:8000/predict?min_score=0.7&masks=polygons"

Only this computer can reach the service, unless --host names an address of the network. It has no passwords: put a
proxy that has them before it. docs/serve.md describes requests and answers. Needs the extra: pip install ".[serve]".
"""

import argparse
import ipaddress
import logging
import signal

from maskrcnn_jax.commands.app import add_model_options, add_runtime_options, at_least, comma_separated, load
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.serving.limits import Limits

_log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_options(parser)
    add_runtime_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; %(default)s is this computer alone")
    parser.add_argument("--port", type=at_least(0), default=8000, help="port; 0 takes a free one; %(default)s")
    parser.add_argument(
        "--public_names",
        type=comma_separated,
        default=[],
        metavar="NAMES",
        help="names by which the service is called besides localhost and its addresses, separated by commas; on a "
        "network all names if not given",
    )
    parser.add_argument(
        "--max_batch",
        type=power_of_two,
        default=Limits.max_batch,
        metavar="N",
        help="most images computed together; %(default)s",
    )
    parser.add_argument(
        "--max_queue",
        type=at_least(1),
        default=Limits.max_queue,
        metavar="N",
        help="most requests at a time; %(default)s",
    )
    parser.add_argument(
        "--max_megabytes",
        type=at_least(1),
        default=Limits.max_bytes // 1_000_000,
        metavar="N",
        help="largest file; %(default)s MB",
    )
    parser.add_argument(
        "--max_megapixels",
        type=at_least(1),
        default=Limits.max_pixels // 1_000_000,
        metavar="N",
        help="largest image; %(default)s million pixels",
    )
    parser.add_argument(
        "--timeout",
        type=at_least(1),
        default=int(Limits.timeout),
        metavar="SECONDS",
        help="most time for an upload, and again for its answer; %(default)s",
    )


def main(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        from maskrcnn_jax.serving.app import Service, create_app
        from maskrcnn_jax.serving.server import bind, listen, make_server
        from maskrcnn_jax.serving.warm_up import warm_up, with_few_sizes
    except ModuleNotFoundError as error:
        raise UserError(
            f'{error.name} is not installed, which serve needs; run pip install ".[serve]" in the clone'
        ) from None
    limits = Limits(
        max_bytes=options.max_megabytes * 1_000_000,
        max_pixels=options.max_megapixels * 1_000_000,
        max_queue=options.max_queue,
        max_batch=options.max_batch,
        timeout=options.timeout,
    )
    with bind(options.host, options.port) as listener:  # before the long wait: the port may be taken
        model = with_few_sizes(load(options))
        warm_up(model, options.max_batch)
        service = Service(model, limits, title=str(options.workdir or options.weights))
        # Anybody may reach an address of the network anyway, by whatever name it has there, unless names are given.
        is_checked = options.public_names or ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        app = create_app(service, names=[name.lower() for name in options.public_names] if is_checked else None)
        server = make_server(app, timeout=limits.timeout, metrics=service.metrics)
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn sends them again at its end, to these handlers
            signal.signal(number, server.handle_exit)
        listen(listener)  # whoever reads the next line may connect at once
        host, port = listener.getsockname()[:2]
        _log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        server.run(sockets=[listener])
    _log.info("stopped; what was in the queue has been answered")


def power_of_two(text: str) -> int:
    """Return an option that is a power of two."""
    number = at_least(1)(text)
    if number & (number - 1):
        raise argparse.ArgumentTypeError(f"{text} is not a power of two; give 1, 2, 4, 8, ...")
    return number
