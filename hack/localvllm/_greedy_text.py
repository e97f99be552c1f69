"""Runs inside vLLM's environment: prints the greedy token ids of a cold load. See `models.py`."""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_PLUGINS": "",
}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}

from vllm import LLM, SamplingParams

request = json.loads(sys.argv[1])
llm = LLM(
    request["model"], dtype="float32", enforce_eager=True, max_model_len=256, disable_log_stats=True
)
sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
print(
    json.dumps(
        [
            list(answer.outputs[0].token_ids)
            for answer in llm.generate(prompts, sampling, use_tqdm=False)
        ]
    )
)
