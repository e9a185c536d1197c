"""Distil in a plain PyTorch loop: python docs/library/plain_loop.py STUDENT TEACHER TEXTS.jsonl"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpipe import KV, Distiller, Logits

student_id, teacher_id, path = sys.argv[1:]
texts = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
student = AutoModelForCausalLM.from_pretrained(student_id)
tokenizer = AutoTokenizer.from_pretrained(student_id, padding_side="right")
distiller = Distiller.fit(student, tokenizer, {"teacher": teacher_id}, texts, terms=KV() | Logits(0.5))
optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=1e-3)
with distiller.record(student) as run:
    for step in range(8):
        batch = tokenizer([texts[(4 * step + i) % len(texts)] for i in range(4)], return_tensors="pt", padding=True)
        batch.pop("token_type_ids", None)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        cross_entropy = student(**batch, labels=labels).loss
        loss = cross_entropy + distiller.loss(run, batch, progress=(step, 8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        terms = {name: round(value.item(), 3) for name, value in distiller.last.values.items()}
        print(f"step {step + 1}: cross-entropy {cross_entropy.item():.3f}, {terms}")
