"""databricks.yml without a workspace: its fields, its references, and the words that its tasks hand to the boot script."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from databricks.bundles.jobs import Job
from databricks.bundles.model_serving_endpoints import ModelServingEndpoint

from alacarte import launch
from alacarte.databricks import stage

BUNDLE = yaml.safe_load((ROOT / "databricks" / "databricks.yml").read_text())
JOBS = BUNDLE["resources"]["jobs"]
TASKS = [(name, task) for name, job in JOBS.items() for task in job["tasks"]]
TEXTS = re.findall(r"\$\{([^}]+)\}", yaml.safe_dump(BUNDLE))


def known_references() -> set[str]:
    """What `${...}` may name: this bundle's variables and resources, and what the CLI itself fills in."""
    found = {f"var.{name}" for name in BUNDLE["variables"]}
    for kind, resources in BUNDLE["resources"].items():
        found |= {f"resources.{kind}.{name}.name" for name in resources}
    return found | {"bundle.name", "bundle.target", "workspace.file_path", "workspace.current_user.userName"}


def check_references(bundle: dict) -> None:
    """AssertionError for a name that leads nowhere."""
    for name, job in bundle["resources"]["jobs"].items():
        keys = [task["task_key"] for task in job["tasks"]]
        environments = {one["environment_key"] for one in job["environments"]}
        parameters = {one["name"] for one in job.get("parameters", [])}
        assert len(set(keys)) == len(keys), f"{name}: a task_key comes twice"
        for at, task in enumerate(job["tasks"]):
            ahead = {one["task_key"] for one in task.get("depends_on", [])}
            assert ahead <= set(keys[:at]), f"{name}.{task['task_key']}: depends on no earlier task"
            assert task["environment_key"] in environments, f"{name}.{task['task_key']}: no such environment"
            words = task["spark_python_task"]["parameters"]
            assert (ROOT / "databricks" / task["spark_python_task"]["python_file"]).is_file()
            for named in re.findall(r"\{\{job\.parameters\.(\w+)\}\}", " ".join(words)):
                assert named in parameters, f"{name}.{task['task_key']}: no job parameter {named}"
            for word in words:
                if word.startswith(("@run_id=", "@if=")):
                    step = word.partition("=")[2]
                    assert step in ahead, f"{name}.{task['task_key']}: {word} names no task it depends on"
                    assert "@job={{job.run_id}}" in words, f"{name}.{task['task_key']}: {word} needs @job"


@pytest.mark.parametrize("name", JOBS)
def test_each_job_has_only_fields_that_a_job_has(name: str):
    job = Job.from_dict(JOBS[name])
    assert [task.task_key for task in job.tasks] == [task["task_key"] for task in JOBS[name]["tasks"]]
    broken = {**JOBS[name], "tasks": [{**JOBS[name]["tasks"][0], "depend_on": []}]}
    with pytest.raises(ValueError, match="depend_on"):
        Job.from_dict(broken)


def test_the_endpoint_has_only_fields_that_an_endpoint_has():
    for endpoint in BUNDLE["resources"]["model_serving_endpoints"].values():
        assert ModelServingEndpoint.from_dict(endpoint).config.served_entities


def test_no_name_leads_nowhere():
    assert set(TEXTS) <= known_references()
    check_references(BUNDLE)
    for where, value in (
        (("tasks", 1, "depends_on"), [{"task_key": "trian"}]),
        (("tasks", 0, "environment_key"), "pin"),
        (("parameters",), []),
    ):
        broken = yaml.safe_load(yaml.safe_dump(BUNDLE))
        place = broken["resources"]["jobs"]["train"]
        for key in where[:-1]:
            place = place[key]
        place[where[-1]] = value
        with pytest.raises(AssertionError, match=r"no earlier task|no such environment|no job parameter"):
            check_references(broken)


@pytest.mark.parametrize(("name", "task"), TASKS, ids=lambda one: one if isinstance(one, str) else one["task_key"])
def test_each_task_is_an_entry_point_with_keys_that_it_has(name: str, task: dict):
    module, *words = task["spark_python_task"]["parameters"]
    assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file()
    if module.startswith("steps."):
        entry = next(key for key, one in stage.entry_points(ROOT).items() if one["command"].endswith(f" {module}"))
        tokens = [word for word in words if not word.startswith(("@", "overrides="))]
        filled = [re.sub(r"\$\{var\.(\w+)\}", lambda m: BUNDLE["variables"][m[1]]["default"], one) for one in tokens]
        assert launch.compose(entry, [*filled, *(["run_id=x"] if "@run_id=train" in words else [])]) is not None


def test_the_targets_keep_apart():
    dev, prod = BUNDLE["targets"]["dev"], BUNDLE["targets"]["prod"]
    assert dev["mode"] == "development" and dev["default"] and prod["mode"] == "production"
    assert set(dev["variables"]) <= set(BUNDLE["variables"])
    assert dev["variables"]["registered_model_name"] != BUNDLE["variables"]["registered_model_name"]["default"]
    for name in (dev["variables"], {key: one["default"] for key, one in BUNDLE["variables"].items()}):
        assert len(name["registered_model_name"].split(".")) == 3 and name["experiment"].startswith("/")
