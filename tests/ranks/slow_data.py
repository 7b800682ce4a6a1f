"""A dataset that takes its time: on rank 0 first, then on the others."""

import time

from nemo_automodel.components.datasets.llm.column_mapped import make_instruction_dataset


def slow(tokenizer, seconds, path="data.jsonl"):
    print("slow data", flush=True)
    time.sleep(seconds)
    columns = {"question": "question", "answer": "answer"}
    return make_instruction_dataset(tokenizer, path, column_mapping=columns)
