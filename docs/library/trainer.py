"""Distil with transformers' Trainer: python docs/library/trainer.py STUDENT TEACHER TEXTS.jsonl"""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from kvpipe import KV, DistillationMixin, Distiller, Logits


class DistillTrainer(DistillationMixin, Trainer):
    """The Trainer, with a distiller's loss beside its own."""


student_id, teacher_id, path = sys.argv[1:]
data = load_dataset("json", data_files=path, split="train")
student = AutoModelForCausalLM.from_pretrained(student_id)
tokenizer = AutoTokenizer.from_pretrained(student_id, padding_side="right")
distiller = Distiller.fit(student, tokenizer, {"teacher": teacher_id}, data["text"], terms=KV() | Logits(0.5))
tokens = data.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=data.column_names)
args = TrainingArguments("build/trainer", max_steps=8, per_device_train_batch_size=4, logging_steps=1, report_to=[],
                         learning_rate=1e-3, save_strategy="no", use_cpu=True, disable_tqdm=True)  # fmt: skip
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
DistillTrainer(student, args, collator, tokens, distiller=distiller).train()
