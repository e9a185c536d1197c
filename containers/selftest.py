"""What an image must be able to do, run inside it by the definition's `%test`: import the packages, train two steps.

usage: selftest.py VARIANT    (`cpu`, or any build of torch for CUDA)
"""

import importlib
import sys

import torch

variant, cuda = sys.argv[1], torch.version.cuda
if (variant == "cpu") != (cuda is None):
    built = f"for CUDA {cuda}" if cuda else "for the CPU"
    sys.exit(
        f"torch {torch.__version__} is built {built}, not VARIANT={variant}: name an index that has it, TORCH_INDEX="
    )

PACKAGES = (
    "datasets safetensors tokenizers numpy scipy pandas pyarrow matplotlib pydantic yaml jaxtyping einops jinja2 rich "
    "typer peft psutil huggingface_hub snakemake"
)

for name in PACKAGES.split():
    importlib.import_module(name)

from accelerate import Accelerator  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
)
accelerator = Accelerator()
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
ids = torch.randint(0, 61, (3, 7), device=accelerator.device)
losses = []
for _ in range(2):
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[1] < losses[0], f"the loss did not fall: {losses}"
print(f"torch {torch.__version__}: two training steps on {accelerator.device}, loss {losses[0]:.3f} → {losses[1]:.3f}")
