"""Make a model serving endpoint of Databricks serve the champion. An endpoint serves a fixed version and follows no alias.

python -m alacarte.databricks.endpoint alacarte main.default.alacarte
"""

import argparse
import sys
from collections.abc import Sequence

from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException
from requests import HTTPError

from alacarte import registry
from alacarte.errors import UserError

# The settings of a served model that an endpoint accepts; its other fields are only for reading.
SETTINGS = ("name", "entity_name", "entity_version", "workload_size", "workload_type", "scale_to_zero_enabled",
         "environment_vars", "instance_profile_arn", "min_provisioned_concurrency", "max_provisioned_concurrency")  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m alacarte.databricks.endpoint")
    parser.add_argument("endpoint")
    parser.add_argument("registered_model_name")
    options = parser.parse_args(arguments)
    try:
        print(f"endpoint: {follow(options.endpoint, options.registered_model_name)}")
        return 0
    except UserError as error:
        print(f"endpoint: {error}", file=sys.stderr)
        return 2


def follow(endpoint: str, name: str) -> str:
    """Make an endpoint serve the champion of `name`, with all its other settings; return one line about it.

    UserError if there is no champion, no endpoint, or no served model of that name in it.
    """
    number = registry.number_of(registry.require_champion(name))
    client = get_deploy_client("databricks")
    assert client is not None
    try:
        config = client.get_endpoint(endpoint)["config"]
    except (HTTPError, MlflowException) as error:
        fix = "deploy databricks/databricks.yml first"
        raise UserError(f"endpoint {endpoint} cannot be read: {error}: {fix}") from None
    served = [{key: entity[key] for key in SETTINGS if key in entity} for entity in config["served_entities"]]
    ours = [entity for entity in served if entity.get("entity_name") == name]
    if not ours:
        raise UserError(f"endpoint {endpoint} serves {', '.join(e['entity_name'] for e in served)}, not {name}")
    if all(str(entity["entity_version"]) == number for entity in ours):
        return f"{endpoint} serves version {number} of {name} already"
    for entity in ours:
        entity["entity_version"] = number
    kept = {key: config[key] for key in ("traffic_config", "auto_capture_config") if key in config}
    client.update_endpoint_config(endpoint, {"served_entities": served, **kept})
    return f"{endpoint} goes over to version {number} of {name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
