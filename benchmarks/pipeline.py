"""What the pipeline costs beside one plain script that does the same job: CPU time, both in one run, in turn.

    python benchmarks/pipeline.py --rounds 5

CPU time is that of the command and all its children, as the operating system counts it. Every round starts each command in
a fresh copy of the project with an empty store that is already made; the reused run follows the first in the same folder.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "one_script.py")]
STEPS = [sys.executable, "-m", "steps.pipeline"]
PROJECT = [str(Path(sys.executable).with_name("mlflow")), "run", ".", "--env-manager", "local"]


def cpu_seconds(command: list[str], folder: Path) -> float:
    """User and system seconds of a command and its children; the command must succeed."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }
    for name in [name for name in env if name.startswith("MLFLOW_")]:
        del env[name]
    env["MLFLOW_DISABLE_TELEMETRY"] = "true"  # on either side
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read().decode()}")
    return usage.ru_utime + usage.ru_stime


def fresh(folder: Path) -> Path:
    """A copy of the project with an empty store."""
    for part in ("conf", "alacarte", "project", "steps"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("MLproject", "python_env.yaml", "requirements.txt"):
        shutil.copy(ROOT / file, folder / file)
    subprocess.run(
        [sys.executable, "-c", "import mlflow; mlflow.search_experiments()"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    subprocess.run([sys.executable, "-m", "compileall", "-q", "alacarte", "project", "steps"], cwd=folder, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {
        "one script": [],
        "steps.pipeline": [],
        "steps.pipeline, reused": [],
        "mlflow run": [],
    }
    for number in range(rounds + 1):  # the first warms the disk caches and is not counted
        with tempfile.TemporaryDirectory() as root:
            took = {"one script": cpu_seconds(SCRIPT, fresh(Path(root, "a")))}
            steps = fresh(Path(root, "b"))
            took["steps.pipeline"] = cpu_seconds(STEPS, steps)
            took["steps.pipeline, reused"] = cpu_seconds(STEPS, steps)
            took["mlflow run"] = cpu_seconds(PROJECT, fresh(Path(root, "c")))
        if number:
            for name, value in took.items():
                seconds[name].append(value)
        print(f"round {number}: " + ", ".join(f"{name} {value:.1f} s" for name, value in took.items()), file=sys.stderr)

    print("| command | CPU s, median | ratio to one script, median (min to max) |\n|---|---|---|")
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, seconds["one script"], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(values):.1f} | {ratio} |")
    reused = [b / a for a, b in zip(seconds["steps.pipeline"], seconds["steps.pipeline, reused"], strict=True)]
    print(f"\nreused run to first run: {statistics.median(reused):.2f}")


if __name__ == "__main__":
    main()
