"""`finetune serve`: an OpenAI-compatible endpoint for a run or an export."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from finetune.cli.arguments import add_command, check_typed_in_project, large_imports, path, text
from finetune.errors import UserError
from finetune.runtime.installed import install_command
from finetune.stage_end.following import after_serving
from finetune.stage_end.tell import cost_of_command, tell


def add(commands: Any) -> None:
    serve = add_command(
        commands,
        "serve",
        _serve,
        "answer questions with SQL at an OpenAI-compatible endpoint",
        "finetune serve runs/demo --db shop=shop.sqlite --execute   (then: finetune ask http://127.0.0.1:8000 --db shop ...)\n"
        "  finetune serve runs/demo/exports/merged --host 0.0.0.0 --api-key-env SERVE_KEY",
    )
    serve.add_argument("target", type=path, metavar="RUN|EXPORT")
    serve.add_argument("--port", type=_port, default=8000, help="8000; 0: any free one")
    serve.add_argument("--host", type=text, default="127.0.0.1", help="127.0.0.1; another one needs --api-key-env")
    serve.add_argument(
        "--db", action="append", default=[], metavar="NAME=FILE", dest="databases",
        help="a SQLite file, or a schema as .sql file, that questions can name; may be given several times",
    )  # fmt: skip
    serve.add_argument(
        "--execute", action="store_true", help="also run the SQL on databases of --db, read-only, and send the rows"
    )
    serve.add_argument(
        "--backend", choices=("auto", "vllm", "llama.cpp", "hf"), default="auto",
        help="who computes the answers; auto: vLLM on a GPU, llama.cpp on a CPU, hf (slower) where they are missing",
    )  # fmt: skip
    serve.add_argument(
        "--api-key-env",
        type=text,
        metavar="VARIABLE",
        help="the environment variable with the key that clients have to show",
    )
    serve.add_argument(
        "--idle-minutes",
        type=_not_negative,
        default=0.0,
        metavar="N",
        help="end after N minutes without a request; 0: never",
    )
    serve.add_argument("--max-hours", type=_not_negative, default=0.0, metavar="N", help="end after N hours; 0: never")
    serve.add_argument(
        "--heartbeat", type=path, metavar="FILE", help="a JSON file that says when the last request came"
    )


def _serve(arguments: argparse.Namespace) -> int:
    for package in ("starlette", "uvicorn", "httpx"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the package {package} is not installed; run `{install_command('serve')}`",
                code="install.missing_package",
            )
    from finetune.run_folder import RunFolder

    check_typed_in_project(RunFolder(arguments.target), data=False)
    with large_imports():
        from finetune.serve.run import Options, serve

    names = ("host", "port", "databases", "execute", "backend", "api_key_env", "idle_minutes", "max_hours", "heartbeat")
    code = serve(arguments.target, Options(**{name: getattr(arguments, name) for name in names}))
    tell("serve", cost_of_command(), after_serving(arguments.typed))
    return code


def _port(value: str) -> int:
    if not value.isdigit() or int(value[:6]) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, found {value!a}")
    return int(value)


def _not_negative(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, found {value!a}")
    return number
