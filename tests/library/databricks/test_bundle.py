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
DEFAULTS = {name: variable["default"] for name, variable in BUNDLE["variables"].items()}


def test_each_resource_has_only_fields_that_it_can_have():
    for job in JOBS.values():
        assert [task.task_key for task in Job.from_dict(job).tasks] == [task["task_key"] for task in job["tasks"]]
    for endpoint in BUNDLE["resources"]["model_serving_endpoints"].values():
        assert ModelServingEndpoint.from_dict(endpoint).config.served_entities


def test_every_reference_leads_somewhere():
    known = {f"var.{name}" for name in DEFAULTS}
    for kind, resources in BUNDLE["resources"].items():
        known |= {f"resources.{kind}.{name}.name" for name in resources}
    known |= {"bundle.name", "bundle.target", "workspace.file_path", "workspace.current_user.userName"}
    assert set(re.findall(r"\$\{([^}]+)\}", yaml.safe_dump(BUNDLE))) <= known


@pytest.mark.parametrize("name", JOBS)
def test_each_task_is_an_entry_point_with_keys_that_it_has(name: str):
    job, before = JOBS[name], set[str]()
    for task in job["tasks"]:
        ahead = {other["task_key"] for other in task.get("depends_on", [])}
        assert ahead <= before and task["task_key"] not in before
        before.add(task["task_key"])
        assert task["environment_key"] in {each["environment_key"] for each in job["environments"]}
        assert (ROOT / "databricks" / task["spark_python_task"]["python_file"]).is_file()
        module, *words = task["spark_python_task"]["parameters"]
        parameters = {each["name"] for each in job.get("parameters", [])}
        assert set(re.findall(r"\{\{job\.parameters\.(\w+)\}\}", " ".join(words))) <= parameters
        steps = {word.partition("=")[2] for word in words if word.startswith(("@run_id=", "@if="))}
        assert steps <= ahead and (not steps or "@job={{job.run_id}}" in words)
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file()
        if module.startswith("steps."):
            entry = next(
                key for key, each in stage.entry_points(ROOT).items() if each["command"].endswith(f" {module}")
            )
            keys = [word for word in words if not word.startswith(("@", "overrides="))]
            filled = [re.sub(r"\$\{var\.(\w+)\}", lambda match: DEFAULTS[match[1]], key) for key in keys]
            assert launch.compose(entry, [*filled, *(["run_id=x"] if "@run_id=train" in words else [])]) is not None


def test_the_targets_keep_apart():
    dev, prod = BUNDLE["targets"]["dev"], BUNDLE["targets"]["prod"]
    assert dev["mode"] == "development" and dev["default"] and prod["mode"] == "production"
    assert set(dev["variables"]) <= set(DEFAULTS)
    assert dev["variables"]["registered_model_name"] != DEFAULTS["registered_model_name"]
    for names in (dev["variables"], DEFAULTS):
        assert len(names["registered_model_name"].split(".")) == 3 and names["experiment"].startswith("/")
