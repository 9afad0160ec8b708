"""A small study in a process of its own, for the tests that kill it, share its folder or distribute it.

python study_process.py RESULT [--out FOLDER] [--slow SECONDS] [--change NAME] [--process K --port P]
"""

import argparse
import time

import jax


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("result")
    parser.add_argument("--out")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--change", default="")
    parser.add_argument("--process", type=int)
    parser.add_argument("--port")
    values = parser.parse_args()
    if values.process is not None:
        jax.distributed.initialize(f"localhost:{values.port}", num_processes=2, process_id=values.process)

    from quadratic import constant, decayed, quadratic_task

    from adaptive_optax import study
    from adaptive_optax.study.engine import trials

    if values.slow:  # so that there is time to kill it
        run = trials.Program.run

        def slowly(self, *arguments):
            time.sleep(values.slow)
            return run(self, *arguments)

        trials.Program.run = slowly

    task = quadratic_task(1.0, 0.5 if values.change == "loss" else 1.0, name="small")
    arms = {"constant": constant, "decayed": decayed(1.0, 0.8 if values.change == "arm" else 1.0)}
    comparison = study.compare(
        task,
        arms,
        learning_rates=[0.1, 0.2] if values.change == "grid" else [0.1, 0.3, 1.0],
        steps=10,
        seeds=values.seeds,
        out=values.out,
        mode="vmap" if values.change == "mode" else "scan",
        chunk=3 if values.change == "chunk" else 2,
    )
    comparison.save(values.result)
    print(comparison.verdict().sentence)


if __name__ == "__main__":
    main()
