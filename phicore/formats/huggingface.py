"""Model directories of transformers: config.json, safetensors weights and a tokenizer. One GGUF file is read too."""

import copy
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from phicore import atomic
from phicore.formats import bitsandbytes
from phicore.formats.links import check_links
from phicore.formats.peft_fields import CONFIG as ADAPTER
from phicore.formats.pretrained import save_in_layout, tied_as_is
from phicore.formats.safetensors_files import INDEX, WEIGHTS, TensorFile, coded_with_scales, model_tensors
from phicore.nf4.linear import NF4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
SETTINGS = (CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")

logger = logging.getLogger(__name__)


# ===== loading =====


def load_model(path_or_id: str, dtype: torch.dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Loads a causal language model and its tokenizer. No code of the model's author is run and no pickle is read.

    Args:
        path_or_id: a directory of transformers with safetensors weights, one in bitsandbytes' NF4 (its linear layers
            become NF4Linear), a directory that holds one .gguf file, a .gguf file (its weights are dequantized), or a
            name on the Hugging Face hub.
        dtype: of the weights, whatever the files have.

    Returns:
        The model, in eval mode on the CPU, and a tokenizer that has a pad token: if it comes without one, its eos
        token is taken and a warning is logged.

    Raises:
        ImportError: transformers (or gguf) is not installed.
        FileNotFoundError: a path that is not there, or a directory that lacks the configuration, weights or tokenizer.
        OSError: a name that is no directory, and that the hub does not answer.
        ValueError: not a causal language model; weights that are damaged, missing or of another shape, or that
            dtype cannot hold; weights that another library has quantized; a tokenizer that does not fit the model.
    """
    source, gguf_file = find_model(path_or_id)
    transformers = import_transformers(gguf=gguf_file is not None)
    local = Path(source).is_dir()
    extra: dict[str, Any] = {"trust_remote_code": False} | ({"gguf_file": gguf_file} if gguf_file else {})
    with quiet_transformers(transformers, bars=not local), plain_errors(path_or_id, local):
        config = transformers.AutoConfig.from_pretrained(source, **extra)
        _check_config(config, path_or_id, gguf_file is not None)
        weights = model_tensors(Path(source)) if local and gguf_file is None else {}
        if weights:
            _check_size(config, weights, path_or_id)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **extra)
        except (OSError, ImportError, MemoryError):
            raise
        except Exception as error:
            if local:  # these are long: read twice only for a reason
                check_objects(Path(source), ["tokenizer.json", "vocab.json"])
            why = f"{type(error).__name__}: {_one_line(error)}"
            raise ValueError(f"{path_or_id}: its tokenizer's files do not load: {why}") from error
        if local and _quantization(config).get("load_in_4bit"):
            model = bitsandbytes.load_quantized(Path(source), config, dtype)
            save_in_layout(model)
            return _checked(model, tokenizer, path_or_id)
        if gguf_file is not None and hasattr(transformers, "GgufConfig"):
            extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported in info, and refused below
            output_loading_info=True,
            **extra,
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # of a name on the hub
        raise ValueError(f"{path_or_id} holds a model and an adapter ({ADAPTER}); give a directory of the model alone")
    _check_loaded(path_or_id, info)
    _check_dtypes(model, weights, path_or_id)
    _clear_gguf_marks(model)
    return _checked(model, tokenizer, path_or_id)


@contextmanager
def plain_errors(path_or_id: str, local: bool) -> Iterator[None]:
    """Within it, what transformers raises over a file or a name becomes a ValueError or OSError that names it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path_or_id}: its weights are not a whole safetensors file: {error}") from error
    except OSError as error:
        if local:
            raise
        raise OSError(f'no such directory: "{path_or_id}"; and as a name on the hub: {_one_line(error)}') from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path_or_id} needs code of its author, which is not run here; load it by transformers, and use phicore "
            f"on the loaded model in Python, or give a model of a class that transformers has"
        ) from error
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a wrong value in a file can lead transformers to any other
        raise ValueError(f"{path_or_id}: its files lead to {type(error).__name__}: {_one_line(error)}") from error


def model_config(path_or_id: str) -> Any:
    """The configuration of a causal language model; of a directory, config.json alone is needed.

    Raises:
        FileNotFoundError, OSError, ValueError: as `load_model`; a model that is quantized.
    """
    path = Path(path_or_id).expanduser()
    source, gguf_file = (str(path), None) if (path / CONFIG).is_file() else find_model(path_or_id)
    check_objects(Path(source), [CONFIG])
    transformers = import_transformers(gguf=gguf_file is not None)
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    with quiet_transformers(transformers, bars=False), plain_errors(path_or_id, Path(source).is_dir()):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **extra)
        _check_config(config, path_or_id, gguf_file is not None)
    if (quantization := _quantization(config)) and gguf_file is None:
        raise ValueError(
            f"{path_or_id} is quantized already ({quantization.get('quant_method')}); give its full-precision original "
            "(only the configuration is read)"
        )
    return config


def dense_config(directory: Path) -> Any:
    """The configuration of a directory that holds a causal language model which is not quantized.

    Raises:
        ValueError: another kind of model, one that is quantized, or one far larger than the files.
    """
    transformers = import_transformers()
    with plain_errors(str(directory), local=True):
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        _check_config(config, str(directory), from_gguf=False)
        if quantization := _quantization(config):
            raise ValueError(
                f"{directory} is quantized already ({quantization.get('quant_method')}); give its full-precision "
                f"original"
            )
        _check_size(config, model_tensors(directory), str(directory))
    return config


def _checked(model: Any, tokenizer: Any, path_or_id: str) -> tuple[Any, Any]:
    """The pair, ready for use, once the tokenizer is known to fit the model."""
    _give_pad_token(tokenizer, path_or_id)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"{path_or_id}: the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}")
    return model.eval(), tokenizer


def find_model(path_or_id: str) -> tuple[str, str | None]:
    """Says where a model is, after looking at what is there.

    Args:
        path_or_id: as in `load_model`.

    Returns:
        (directory or name on the hub, name of the GGUF file in that directory or None).

    Raises:
        FileNotFoundError: as in `load_model`.
        ValueError: a file that is not GGUF; a directory with several GGUF files, or with links that lead out of it.
    """
    path = Path(path_or_id).expanduser()
    if path_or_id and path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path_or_id} is a file; give a .gguf file or the directory that holds {CONFIG}")
        return str(path.parent), path.name
    if path_or_id and path.is_dir():
        return str(path), look_into(path)
    if not path_or_id or path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") > 1 or path.suffix == ".gguf":
        raise FileNotFoundError(f'no such file or directory: "{path_or_id}"')
    return path_or_id, None


def look_into(directory: Path) -> str | None:
    """The name of a directory's GGUF file, or None if it is a complete directory of transformers."""
    check_links(directory)
    gguf_files = sorted(file.name for file in directory.glob("*.gguf"))
    has_config = (directory / CONFIG).is_file()
    if (directory / ADAPTER).is_file():
        if not has_config and not gguf_files:
            raise FileNotFoundError(
                f"{directory} holds an adapter and no model; give its base as the model, and this as the adapter"
            )
        raise ValueError(
            f"{directory} holds a model and an adapter ({ADAPTER}), which transformers would load together; move the "
            f"adapter's files into a directory of their own"
        )
    if has_config and ((directory / WEIGHTS).is_file() or (directory / INDEX).is_file() or not gguf_files):
        check_objects(directory, SETTINGS)
        model_tensors(directory)
        if not any((directory / name).is_file() for name in TOKENIZERS):
            raise FileNotFoundError(f"{directory} holds no tokenizer; looked for {', '.join(TOKENIZERS)}")
        return None
    if len(gguf_files) == 1:
        return gguf_files[0]
    if gguf_files:
        raise ValueError(f"{directory} holds several GGUF files; give one of them: {', '.join(gguf_files)}")
    raise FileNotFoundError(f"{directory} holds no model; looked for {CONFIG} or one .gguf file")


def check_objects(directory: Path, names: Iterable[str]) -> None:
    """Raises ValueError for a file of these names that holds no JSON object: transformers passes over some of them, and
    does not name others."""
    for file in (directory / name for name in names):
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} is not a whole JSON file: {error}") from error
            if not isinstance(found, dict):
                raise ValueError(f"{file} must hold a JSON object, holds a {type(found).__name__}")


def _check_config(config: Any, path_or_id: str, from_gguf: bool) -> None:
    """Raises ValueError for a configuration that is not read; takes off what says which code of its author to run: a
    directory that is written from it would name files that are not in it."""
    transformers = import_transformers()
    vars(config).pop("auto_map", None)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f'{path_or_id} is a model of type "{config.model_type}", which is not a causal language model')
    quantization = _quantization(config)
    nf4 = quantization.get("load_in_4bit") and quantization.get("bnb_4bit_quant_type") == "nf4"
    if quantization and not from_gguf and not (nf4 and Path(path_or_id).expanduser().is_dir()):
        raise ValueError(
            f"{path_or_id} is quantized already ({quantization.get('quant_method')}), which is read only from a local "
            f"directory in bitsandbytes' NF4; give its full-precision original, which phicore quantizes itself"
        )


def _check_size(config: Any, weights: dict[str, TensorFile], path_or_id: str) -> None:
    """Refuses a configuration of a far larger model than the files hold, before memory is taken for it."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > len(weights):
        raise ValueError(f"{path_or_id}: its {CONFIG} describes {layers} layers, its files hold {len(weights)} tensors")
    described = sum(parameter.numel() for parameter in meta_model(config).parameters())
    stored = sum(file.entries[key].stop - file.entries[key].start for key, file in weights.items())
    if described > 4 * stored:  # a byte of a coded weight is two weights, whatever dtype it is held as
        raise ValueError(f"{path_or_id}: its {CONFIG} describes {described} weights, its files hold {stored} bytes")


def meta_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model that a configuration describes, without weights."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # or transformers would build layers of another library
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).to("meta")  # what is drawn is not made there


def _quantization(config: Any) -> dict[str, Any]:
    """config.quantization_config as plain values; empty if the model is not quantized."""
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def _check_loaded(path_or_id: str, info: dict[str, Any]) -> None:
    """A weight that the files do not give would stay random, so it is an error; one too many is only reported."""
    missing = sorted(info["missing_keys"])
    unlike = [
        f"{key} ({list(found)} in the files, {list(wanted)} in the model)"
        for key, found, wanted in sorted(info["mismatched_keys"])
    ]
    problems = [
        f"{what}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
        for what, names in (("missing weights", missing), ("weights of another shape", unlike))
        if names
    ]
    if problems:
        raise ValueError(f"{path_or_id} does not fit the model that its {CONFIG} describes: {'; '.join(problems)}")
    if info.get("unexpected_keys"):
        logger.warning("%s: weights that the model does not use: %s", path_or_id, sorted(info["unexpected_keys"])[:10])


def _check_dtypes(model: Any, weights: Mapping[str, TensorFile], path_or_id: str) -> None:
    """Refuses a weight that is held as integers or beside a scale, which say nothing without it, and one that became
    infinite in float16. One that is infinite in the files already is let be."""
    named = dict(model.named_parameters())
    integers = {name for name, file in weights.items() if not file.entries[name].dtype.is_floating_point}
    # The model may have other names for them, such as one for all experts; masks and positions are no ".weight".
    coded = {name for name in integers if name in named or name.endswith(".weight")}
    for name in sorted(coded | coded_with_scales(model.state_dict(), weights)):
        raise ValueError(
            f"{weights[name].path}: {name} is held as {weights[name].entries[name].dtype}, coded by another library; "
            f"give the model's full-precision original"
        )
    for name, parameter in named.items():
        weight = parameter.detach()
        if weight.dtype != torch.float16 or not weight.numel() or not torch.stack(weight.aminmax()).isinf().any():
            continue
        if name not in weights:  # of a GGUF file or the hub, or under another name
            raise ValueError(f"{path_or_id}: {name} holds larger values, {bitsandbytes.BEYOND_FLOAT16}")
        file = weights[name]
        bitsandbytes.cast(file.read(name), torch.float16, f"{file.path}: {name}")


def _give_pad_token(tokenizer: Any, path_or_id: str) -> None:
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise ValueError(f"{path_or_id}: its tokenizer has neither a pad token nor an eos token; set pad_token in it")
    tokenizer.pad_token = tokenizer.eos_token
    logger.warning("%s: its tokenizer has no pad token; its eos token %r is used", path_or_id, tokenizer.eos_token)


def _clear_gguf_marks(model: Any) -> None:
    """Takes off what says "quantized by GGUF": the weights are dense by now, and save_pretrained would refuse them."""
    method = getattr(model, "quantization_method", None)
    if getattr(method, "value", method) != "gguf":
        return
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(mark, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


# ===== saving =====


def save_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a directory from which transformers' from_pretrained makes the same model; whole or not at all.

    A head that config.tie_word_embeddings ties to the embedding, but that has come to differ from it (an adapter was
    merged into one of them), is written as a weight of its own, and the written config.json says so.

    Args:
        model: a model of transformers whose layers are its own or NF4Linear, which are written in bitsandbytes' layout;
            no adapter that is not merged.
        tokenizer: written beside it.
        directory: made; must be missing or empty.
        overwrite: replace a directory that is there. The old one is removed last.

    Raises:
        FileExistsError: the directory is not empty and overwrite is False.
        TypeError: the model holds adapter layers, whose weights transformers would not find.
    """
    quantized = any(isinstance(module, NF4Linear) for module in model.modules())
    for name, module in model.named_modules():
        if type(module).__module__.startswith("phicore.") and not isinstance(module, NF4Linear):
            raise TypeError(
                f"{name} is a {type(module).__name__}, which a directory of transformers cannot hold; merge the "
                f"adapters first"
            )
    _clear_gguf_marks(model)
    with (
        atomic.new_directory(directory, overwrite=overwrite) as temporary,
        quiet_transformers(import_transformers(), bars=False),
        tied_as_is(model),
    ):
        if quantized:
            bitsandbytes.save_quantized(model, temporary)
        else:
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def convert_gguf(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    dtype: torch.dtype,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a GGUF file's model and tokenizer as a directory of transformers: loading that is ten times as fast.

    Args:
        source: a .gguf file, or a directory that holds one.
        directory: to be made; see `save_model`.
        dtype: of the weights that are written.
    """
    model, tokenizer = load_model(os.fspath(source), dtype)
    save_model(model, tokenizer, directory, overwrite=overwrite)


# ===== transformers itself =====


def import_transformers(*, gguf: bool = False) -> Any:
    try:
        import transformers

        if gguf:  # transformers needs both to read such a file
            import accelerate  # noqa: F401
            import gguf as _  # noqa: F401
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name
        why = f"{error.name}, which is not installed" if missing else f"a package that does not import ({error})"
        raise ImportError(
            f"reading and writing model directories needs {why}; in phicore's checkout: pip install -e '.[hf]'"
        ) from error
    return transformers


@contextmanager
def quiet_transformers(transformers: Any, *, bars: bool) -> Iterator[None]:
    """Within it, transformers logs errors only, and shows progress bars only if `bars` (downloads)."""
    logging_ = transformers.utils.logging
    verbosity, had_bars = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity_error()
    if not bars:
        logging_.disable_progress_bar()
    try:
        yield
    finally:
        logging_.set_verbosity(verbosity)
        if had_bars and not bars:
            logging_.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
