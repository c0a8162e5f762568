"""How long a model takes to load in 4 bits: from the originals, which are quantised on the way, and from a copy that was kept.

    python -m benchmarks.four_bit_load /tmp/mistral-7b --repeat 3 --json four-bit.json

The folder holds a model's files. Each load is a process of its own, the two ways by turns; "cold" means that the files were
dropped from memory before it, as far as this machine's kernel does that. The bits of all tensors are compared, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAME, COMMIT = "benchmark/model", "0" * 40
WAYS = ("originals", "kept")


def once() -> dict[str, Any]:
    """One load: seconds, bytes of GPU and host memory at their peak, and a hash of every tensor."""
    import torch

    from finetune.config.schema import ModelSection, QuantizationSection
    from finetune.models.device import choose_device
    from finetune.models.load import load_base

    device = choose_device("auto")
    torch.zeros(1, device=device.place)
    _import_what_loading_imports(ModelSection(NAME, revision=COMMIT))
    began = time.monotonic()
    model = load_base(ModelSection(NAME, revision=COMMIT), QuantizationSection(), device)
    if device.place.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    digest = hashlib.sha256()
    for name, one in [*model.named_parameters(), *model.named_buffers()]:
        state = getattr(one, "quant_state", None)
        scales = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code] if state else []
        for tensor in [one.data, *scales]:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    gpu = torch.cuda.max_memory_allocated() if device.place.type == "cuda" else 0
    host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "gpu_bytes": gpu, "host_bytes": host, "sha256": digest.hexdigest()}


def _import_what_loading_imports(section: Any) -> None:
    """Seconds of their own, and the same both ways."""
    import accelerate  # type: ignore[import-untyped]
    import bitsandbytes
    import transformers
    import transformers.integrations.bitsandbytes

    from finetune.models.load import load_model_config

    name = load_model_config(section).architectures[0]  # type: ignore[index]
    assert getattr(transformers, name) and accelerate and bitsandbytes


def drop(folder: Path) -> None:
    """The files of a folder from memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model: Path, work: Path, repeat: int) -> dict[str, Any]:
    snapshot = work / "hub" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(model.resolve())
    kept = work / "four-bit"
    found: dict[str, Any] = {"write": load(work, kept), "bytes": size(model), "kept_bytes": size(kept)}
    for state in ("warm", "cold"):
        rows: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(repeat):
            for way in WAYS:
                if state == "cold":
                    drop(model if way == "originals" else kept)
                rows[way].append(load(work, kept if way == "kept" else None))
        found[state] = rows
    hashes = {one["sha256"] for state in ("warm", "cold") for way in WAYS for one in found[state][way]}
    return found | {"same_bits": len(hashes) == 1}


def load(work: Path, kept: Path | None) -> dict[str, Any]:
    """In a process of its own."""
    env = os.environ | {"HF_HUB_CACHE": str(work / "hub"), "HF_HUB_OFFLINE": "1"}
    env.pop("FINETUNE_FOUR_BIT", None)
    if kept:
        env["FINETUNE_FOUR_BIT"] = str(kept)
    command = [sys.executable, "-m", "benchmarks.four_bit_load", "--once"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(found: dict[str, Any]) -> str:
    lines = [f"files: originals {found['bytes'] / 1e9:.2f} GB, kept {found['kept_bytes'] / 1e9:.2f} GB; "
             f"first load, which writes them: {found['write']['seconds']:.1f} s; same bits: {found['same_bits']}"]  # fmt: skip
    for state in ("warm", "cold"):
        for way in WAYS:
            rows = found[state][way]
            seconds = sorted(one["seconds"] for one in rows)
            peak = max(one["gpu_bytes"] for one in rows) / 2**30, max(one["host_bytes"] for one in rows) / 2**30
            lines.append(f"{state} {way:9}  {statistics.median(seconds):6.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})"
                         f"  peak {peak[0]:.1f} GiB GPU, {peak[1]:.1f} GiB host")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="a folder on the disk of the model (default: beside it)")
    parser.add_argument("--once", action="store_true")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once()))
        return
    with tempfile.TemporaryDirectory(dir=options.work or options.model.resolve().parent) as work:
        found = measure(options.model, Path(work), options.repeat)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
