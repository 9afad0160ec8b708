"""A small study in a process of its own, for the tests that kill it, share its folder or distribute it.

python study_process.py RESULT [--out FOLDER] [--slow SECONDS] [--seeds N] [--process K --port P]
python study_process.py RESULT --out FOLDER --change NAME ...    # prints why each changed study is refused
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
    parser.add_argument("--change", nargs="+", default=[])
    parser.add_argument("--process", type=int)
    parser.add_argument("--port")
    parser.add_argument("--function", action="store_true")
    values = parser.parse_args()
    if values.process is not None:
        jax.distributed.initialize(f"localhost:{values.port}", num_processes=2, process_id=values.process)

    import numpy as np
    from jax.experimental import multihost_utils
    from quadratic import constant, decayed, quadratic_task

    from adaptive_optax import study
    from adaptive_optax.study.engine import trials

    if values.slow:  # so that there is time to kill it
        run = trials.Program.run

        def slowly(self, *arguments):
            time.sleep(values.slow)
            return run(self, *arguments)

        trials.Program.run = slowly

    def train(run):
        """A trial over all processes, which reports as often as its seed says, and more in process 0."""
        mine = np.array([run.seed, run.learning_rate * 1000, ord(run.arm[0])], int)
        everyone = multihost_utils.process_allgather(mine).reshape(-1, 3)
        assert (everyone == mine).all(), everyone
        for step in range(run.seed % 3 + (jax.process_index() == 0)):
            run.report(step, 1.0)
        return 1.0 + run.seed + 0.5 * jax.process_index()

    def compare(change=""):
        if values.function:
            arms = {"constant": constant, "decayed": constant}
            settings = {"learning_rates": [0.1, 0.3], "steps": 10, "seeds": 5, "growth": 0, "out": values.out}
            return study.compare(train, arms, **settings)
        return study.compare(
            quadratic_task(1.0, 0.5 if change == "loss" else 1.0, name="small"),
            {"constant": constant, "decayed": decayed(1.0, 0.8 if change == "arm" else 1.0)},
            learning_rates=[0.1, 0.3, 1.0],
            steps=10,
            seeds=values.seeds,
            out=values.out,
            mode="vmap" if change == "mode" else "scan",
            chunk=3 if change == "chunk" else 2,
        )

    for change in values.change:
        try:
            compare(change)
        except ValueError as error:
            print(f"{change}: {error}")
    if not values.change:
        comparison = compare()
        comparison.save(values.result)
        print(comparison.verdict().sentence)


if __name__ == "__main__":
    main()
