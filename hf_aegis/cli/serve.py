"""`hf-aegis serve`: a trained policy for robots and simulators that speak openpi's client protocol."""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hf_aegis.cli.device import resolve_device


CLIENTS = ("libero-openpi", "native")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MIB = 2**20


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--model", required=True, help="folder or Hub id of a PaliGemma with an action expert")
    parser.add_argument("--revision", help="revision of the model on the Hub (default: its main branch)")
    parser.add_argument(
        "--head", choices=["flow", "fast"], default="flow", help="what predicts the actions (default: flow)"
    )
    parser.add_argument("--num_inference_steps", type=int, help="Euler steps of the flow (default: the model's)")
    parser.add_argument(
        "--client",
        choices=CLIENTS,
        default=CLIENTS[0],
        help="what clients send: 'libero-openpi', the keys, mirrored images and state of openpi's LIBERO example "
        "(policies trained on joints need 'observation/joint_position' beside them), or 'native', LIBERO's own names "
        "and upright images (default: libero-openpi)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; there is no authentication (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for a free one (default: 8000)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that the flow starts from (default: 0)")
    parser.add_argument(
        "--max_batch_size", type=int, default=8, help="waiting questions that are answered together (default: 8)"
    )
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=300.0,
        help="after so long a call of the model is taken for stuck: its clients are told (default: 300)",
    )
    parser.add_argument(
        "--max_message_mb", type=int, default=16, help="longest message from a client, in MiB (default: 16)"
    )
    parser.add_argument(
        "--max_clients", type=int, default=64, help="connections at a time; more are turned away (default: 64)"
    )
    parser.add_argument(
        "--idle_seconds",
        type=float,
        default=3600.0,
        help="a client that asks nothing for so long is disconnected (default: 3600)",
    )
    parser.add_argument(
        "--attn_implementation", default="eager", help="attention implementation of the model (default: eager)"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="'auto' takes the GPU where there is one (default: auto)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")


def run(arguments: argparse.Namespace) -> None:
    """Serves until it is interrupted."""
    import asyncio

    from hf_aegis.evaluation.rollouts import ModelPolicy
    from hf_aegis.evaluation.weight_files import policy_fingerprint
    from hf_aegis.serving import ObservationReader, PolicyServer

    policy = ModelPolicy.from_pretrained(
        arguments.model,
        revision=arguments.revision,
        dtype=arguments.dtype,
        device=resolve_device(arguments.device),
        attn_implementation=arguments.attn_implementation,
        head=arguments.head,
        num_inference_steps=arguments.num_inference_steps,
    )
    reader = ObservationReader(arguments.client, policy.cameras, policy.state_features)

    pictures = policy.processor.pictures
    metadata = {
        "model": policy_fingerprint(arguments.model, arguments.revision),
        "head": arguments.head,
        "action_horizon": policy.chunk_size,
        # A simulator had better render like this.
        "pictures": None if pictures is None else pictures.to_dict(),
    }

    async def serve() -> None:
        server = PolicyServer(
            policy,
            reader,
            host=arguments.host,
            port=arguments.port,
            seed=arguments.seed,
            max_batch_size=arguments.max_batch_size,
            max_seconds=arguments.max_seconds,
            max_message_bytes=arguments.max_message_mb * MIB,
            max_clients=arguments.max_clients,
            idle_seconds=arguments.idle_seconds,
            metadata=metadata,
        )
        await server.run(signals=True)

    with _logging_to_stderr() as log:
        for key, value in reader.expected.items():
            log.info("clients send %s: %s", key, value)
        log.info("the model was trained on pictures of %s", pictures or "unknown rendering")
        asyncio.run(serve())


@contextmanager
def _logging_to_stderr() -> Iterator[logging.Logger]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("hf_aegis.serving")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    # Of connections it tells a line each, and the traceback of every port scan.
    logging.getLogger("hf_aegis.serving.server.websockets").setLevel(logging.CRITICAL)
    try:
        yield log
    finally:
        log.removeHandler(handler)
