"""Low-rank adapters on a student (peft), refused where they could not be merged into a student of its kind again."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kvpipe.config import LoraConfig

KEY = "train.lora.target_modules"


def check_lora(config: LoraConfig, hf_config, trust: bool) -> None:
    """Refuse what `adapted` refuses, on a student without weights: before any teacher reads a text.

    Args:
        config: the adapters.
        hf_config: the student's transformers config.
        trust: run the code of its repository.

    Raises:
        ValueError: as `adapted`.
    """
    with torch.device("meta"):
        adapted(AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trust), config)


def adapted(model: PreTrainedModel, config: LoraConfig):
    """The model with adapters, drawn from torch's random state, on the modules that `config` names.

    Raises:
        ValueError: a name is none of the model's modules that take an adapter, or is one whose weight is another's too.
    """
    from peft import LoraConfig as Options
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    if not isinstance(config.target_modules, str):
        _check_names(model, config.target_modules)
    owners = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name.removesuffix(".weight"))
    made = get_peft_model(
        model,
        Options(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=config.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    for module in made.modules():
        names = owners[id(module.get_base_layer().weight)] if isinstance(module, LoraLayer) else []
        if len(names) > 1:
            raise ValueError(
                f"{KEY}: {' and '.join(names)} of the student are one weight (tied), and an adapter on one of them cannot "
                "be saved without the other: leave them out, or untie the student (tie_word_embeddings: false)"
            )
    return made


def _check_names(model: nn.Module, targets: list[str]) -> None:
    """Every name must be that of modules which take an adapter; peft passes over one that is not, if another is."""
    modules = {name: isinstance(m, nn.Linear | nn.Embedding | Conv1D) for name, m in model.named_modules()}
    for target in targets:
        found = [takes for name, takes in modules.items() if f".{name}".endswith(f".{target}")]
        if not found or not all(found):
            known = sorted({name.rpartition(".")[2] for name, takes in modules.items() if takes})
            what = "no linear layer or embedding" if found else "no module of the student"
            raise ValueError(f"{KEY}: {target!r} is {what}; it has {', '.join(known)} (or give all-linear)")
