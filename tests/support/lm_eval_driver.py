"""EleutherAI's lm-eval as it is installed, run by its own front door for each of several models, in a process of its
own: it sets up logging, seeds and event loops as it likes. Reads what to run from a JSON file, writes what came out to
another.

    python lm_eval_driver.py PLAN.json OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(plan_file: str, out_file: str) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    plan: dict[str, Any] = json.loads(Path(plan_file).read_text("utf-8"))
    tasks = TaskManager(include_path=plan["tasks"], include_defaults=False)
    out: dict[str, Any] = {}
    for name, run in plan["runs"].items():
        got = lm_eval.simple_evaluate(
            model=run["model"],
            model_args=run["model_args"],
            tasks=run["tasks"],
            task_manager=tasks,
            batch_size=run.get("batch_size", 1),
            device="cpu",
            bootstrap_iters=0,
        )
        out[name] = {
            task: {
                "scores": {k: v for k, v in got["results"][task].items() if isinstance(v, (int, float))},
                "each": [s["resps"] for s in sorted(samples, key=lambda s: s["doc_id"])],
            }
            for task, samples in got["samples"].items()
        }
    Path(out_file).write_text(json.dumps(out), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
