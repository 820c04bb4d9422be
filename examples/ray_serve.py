"""An OpenAI-compatible server on Ray Serve, with a capacity limit on the experts.

    python examples/ray_serve.py MODEL [--ranks 2] [--mode expanded] [--factor 1.5] [--port 8000]

Needs `ray[serve]`. As with Ray Data, the settings go in by `additional_config`. The experts are
split over `--ranks` GPUs of the cluster that RAY_ADDRESS names, or of this machine. Serves until
it is interrupted; `--check` only builds the deployment, and prints the engine arguments that vLLM
will be given.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ray_data import engine_kwargs


def llm_config(model: str, ranks: int, mode: str, factor: float | str, accelerator: str) -> Any:
    """Ray Serve's description of one model: one replica on `ranks` GPUs."""
    from ray.serve.llm import LLMConfig

    return LLMConfig(
        model_loading_config={"model_id": Path(model).name, "model_source": model},
        accelerator_type=accelerator or None,
        deployment_config={"num_replicas": 1},
        engine_kwargs=engine_kwargs(ranks, mode, factor),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mode", default="expanded")
    parser.add_argument("--factor", default="1.5", help="a number or inf")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--accelerator", default="", help="such as H100; any if not given")
    parser.add_argument("--check", action="store_true", help="build the deployment and end")
    args = parser.parse_args()
    factor = args.factor if args.factor == "inf" else float(args.factor)

    from ray import serve
    from ray.serve.llm import build_openai_app

    config = llm_config(args.model, args.ranks, args.mode, factor, args.accelerator)
    app = build_openai_app({"llm_configs": [config]})
    if args.check:
        print(json.dumps(config.get_engine_config().get_initialization_kwargs(), default=str))
        return 0
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    try:
        serve.run(app, blocking=True)
    except KeyboardInterrupt:
        serve.shutdown()  # else the replicas stay on a cluster that goes on
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
