"""Features and models of the team: trained, evaluated, scored and served for real, in a copy of the project with its own code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import Project, copy_project, environment, tracking
from servers import serving

NAME = "orders"

FEATURES = '''

def make_own(bins: int = 4, cities=("Bonn", "Lyon")) -> Pipeline:
    from sklearn.compose import make_column_transformer

    numbers = make_pipeline(FunctionTransformer(days_and_price, kw_args={"scale": 2.0}), StandardScaler())
    parts = make_column_transformer((numbers, ["bought", "price"]), (Cities(cities), ["city"]))
    return make_pipeline(parts, Rank(bins))


def days_and_price(X, scale):
    days = (pd.to_datetime(X["bought"]) - np.datetime64("2020-01-01")).dt.days
    return np.column_stack([days, np.log1p(X["price"].fillna(0.0)) * scale])


from sklearn.base import BaseEstimator, TransformerMixin


class Cities(TransformerMixin, BaseEstimator):
    def __init__(self, cities):
        self.cities = cities

    def fit(self, X, y=None):
        self.seen_ = {city: i for i, city in enumerate(self.cities)}
        self.rows_ = len(X)
        return self

    def transform(self, X):
        codes = X["city"].astype(object).map(self.seen_).fillna(-1).to_numpy(dtype="float64")
        return (codes[:, None] == np.arange(-1, len(self.cities))).astype("float64")


class Rank(TransformerMixin, BaseEstimator):
    """Adds the bin of the first column, whose limits come from the training rows."""

    def __init__(self, bins):
        self.bins = bins

    def fit(self, X, y=None):
        self.limits_ = np.quantile(X[:, 0], np.linspace(0, 1, self.bins + 1)[1:-1])
        return self

    def transform(self, X):
        return np.column_stack([X, np.digitize(X[:, 0], self.limits_)])
'''

BROKEN = """
import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import make_column_transformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

apply = FunctionTransformer

def fails(X): raise RuntimeError("no\\nrates today")
def other_column(X): return X[["bill"]].to_numpy()
def text(X): return X["city"].map(float).to_frame()
def fewer(X): return X[["price"]].head(7)
def nan(X): return X[["price"]].fillna(0.0).assign(ratio=np.nan)
def nan_array(X): return np.full((len(X), 2), np.nan)
def line(X): return X["price"].to_numpy()

def make_nothing(): pass
def make_array(): return np.zeros(3)
def make_fails(): return apply(fails)
def make_other_column(): return apply(other_column)
def make_text(): return apply(text)
def make_fewer(): return apply(fewer)
def make_nan(): return apply(nan)
def make_nan_array(): return apply(nan_array)
def make_line(): return apply(line)
def make_missing_column(): return make_column_transformer((StandardScaler(), ["bill"]))
def make_lambda(): return apply(lambda X: X[["price"]].fillna(0.0))
def make_stamp(): return apply(keep, kw_args={"day": pd.Timestamp("2020-01-01")})
def keep(X, day): return X[["price"]].fillna(0.0)
"""

# What is wrong with each of these features: words that its line has.
FAULTS = {
    "make_nothing": "project.broken.make_nothing returns NoneType: return a scikit-learn transformer",
    "make_array": "project.broken.make_array returns ndarray: return a scikit-learn transformer",
    "make_fails": "project.broken.make_fails: project.broken.fails: RuntimeError: no rates today",
    "make_other_column": "project.broken.make_other_column: project.broken.other_column: KeyError: .*bill",
    "make_text": "project.broken.make_text: project.broken.text: ValueError: .*'(Lyon|Bonn)' .column 'city'.",
    "make_fewer": "project.broken.make_fewer: project.broken.fewer returns 7 rows for 8 rows",
    "make_nan": "project.broken.make_nan: project.broken.nan returns NaN in column 'ratio'",
    "make_nan_array": "project.broken.make_nan_array: project.broken.nan_array returns NaN in column number 0",
    "make_line": "project.broken.make_line: project.broken.line returns ndarray of shape",
    "make_missing_column": "project.broken.make_missing_column: ValueError: .*bill",
    "make_lambda": "project.broken.make_lambda: the transformer cannot be saved: .*<lambda> is no function at the top level",
    "make_stamp": "project.broken.make_stamp: the transformer cannot be saved: .*pandas.Timestamp",
}


def rows(n: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "bought": [f"2024-{day // 28 + 1:02}-{day % 28 + 1:02}" for day in rng.integers(0, 200, n)],
            "price": rng.lognormal(3, 1, n).round(2),
            "city": rng.choice(["Bonn", "Lyon", "Oslo"], n),
        }
    )
    frame.loc[::9, "city"], frame.loc[5::11, "price"] = None, np.nan
    frame["back"] = np.where(np.log1p(frame["price"].fillna(0)) + (frame["city"] == "Lyon") > 3.2, "yes", "no")
    return frame


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project with features of its own and a champion that has them."""
    root = copy_project(tmp_path_factory.mktemp("own") / "project")
    with (root / "project/features.py").open("a") as file:
        file.write(FEATURES)
    (root / "project/broken.py").write_text(BROKEN)
    (root / "conf/features/own.yaml").write_text("_target_: project.features.make_own\nbins: 4\ncities: [Bonn, Lyon]\n")
    rows(500, 0).to_csv(root / "orders.csv", index=False)
    rows(40, 1).drop(columns="back").to_csv(root / "new.csv", index=False)
    project = Project(root, f"sqlite:///{root}/mlflow.db")
    project.step("pipeline", *DATA, "features=own", "model=sklearn_sgd", f"registered_model_name={NAME}")
    return project


DATA = ("data=table", "data.path=orders.csv", "data.target=back")


def stock_answers(folder: Path, table: Path, elsewhere: Path) -> list:
    """The answers of MLflow alone, in a process that finds no `project` but the one in the model."""
    code = """if True:
        import json, sys
        import mlflow.pyfunc
        import pandas as pd
        try:
            import project
        except ModuleNotFoundError:
            pass
        else:
            raise SystemExit("project is on the path")
        model = mlflow.pyfunc.load_model(sys.argv[1])
        import project.features
        assert project.features.__file__.startswith(sys.argv[1])
        rows = pd.read_csv(sys.argv[2], parse_dates=["bought"])
        print(json.dumps(model.predict(rows).tolist()))
    """
    elsewhere.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code, str(folder), str(table)]
    result = subprocess.run(command, cwd=elsewhere, env=environment(PYTHONPATH=""), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def download(project: Project, to: Path) -> Path:
    with tracking(project.uri):
        return Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@champion", dst_path=str(to)))


def test_the_model_takes_the_original_columns_and_answers_alike_everywhere(own: Project, tmp_path: Path):
    folder = download(own, tmp_path / "model")
    columns = json.loads(yaml.safe_load((folder / "MLmodel").read_text())["signature"]["inputs"])
    assert {column["name"]: column.get("type", "any") for column in columns} == {
        "bought": "datetime", "price": "double", "city": "string",
    }  # fmt: skip
    own.step("score", f"registered_model_name={NAME}", "input=new.csv", "output=answers.csv")
    expected = pd.read_csv(own.root / "answers.csv")["prediction"].tolist()
    assert set(expected) == {"yes", "no"}

    assert stock_answers(folder, own.root / "new.csv", tmp_path / "elsewhere") == expected
    new = pd.read_csv(own.root / "new.csv").astype(object)
    new = new.where(new.notna(), None)
    with serving(own, f"registered_model_name={NAME}", f"serve.cache={tmp_path}/cache") as served:
        served.wait()
        for n in (len(new), 1):
            body = {"dataframe_split": new.head(n).to_dict("split", index=False)}
            assert served.ask("/invocations", body).body["predictions"] == expected[:n]


def in_project(project: Project, code: str, *arguments: str) -> list:
    """What a script in the copy prints as JSON in its last line."""
    result = project.run("python", "-c", f"import sys; sys.path.insert(0, '')\n{code}", *arguments)
    return json.loads(result.stdout.splitlines()[-1])


def test_features_are_fitted_on_the_training_rows_only_and_kept_by_a_retraining(own: Project, tmp_path: Path):
    code = """if True:
        import json, sys
        from pathlib import Path
        from alacarte import learners
        from alacarte.data.dataset import load_data
        split = {"val": 0.15, "test": 0.2, "seed": 0}
        dataset = load_data(_target_="alacarte.data.tables.read_table", path="orders.csv", target="back", split=split)
        learner, (X, y) = learners.load(sys.argv[1]), dataset.part("train")
        parts = learner.model[0][0].named_transformers_
        before = parts["cities"].rows_, learner.model[0][1].limits_.tolist()
        how = {"share": 0.3, "shrink": 0.8, "seed": 0}
        notes = []
        for init in ("warm", "scratch"):
            update = learner.update(X[:200], y[:200], X, y, init=init, **how)
            kept = learner.model[0][0].named_transformers_["cities"].rows_, learner.model[0][1].limits_.tolist()
            notes.append([update.init, kept == before, kept[0]])
        learner.save(Path(sys.argv[2]), example=X.head(), metadata={})
        assert (learners.load(sys.argv[2]).predict(X) == learner.predict(X)).all()
        print(json.dumps([len(X), before[0], notes]))
    """
    n, fitted_rows, notes = in_project(own, code, str(download(own, tmp_path / "model")), str(tmp_path / "next"))
    assert fitted_rows == n < 500
    assert notes == [["warm", True, n], ["scratch", False, 200]]


def test_each_fault_of_own_features_is_one_line(own: Project):
    code = """if True:
        import json, sys
        import pandas as pd
        from pathlib import Path
        from alacarte.errors import UserError
        from alacarte.features import make_features
        from alacarte.learners.sklearn import SklearnLearner
        from sklearn.linear_model import LogisticRegression
        import project.broken
        table, lines = pd.read_csv("orders.csv"), {}
        X, y = table.drop(columns="back"), table["back"]
        for name in json.loads(sys.argv[1]):
            try:
                features = make_features(f"project.broken.{name}", getattr(project.broken, name)())
                learner = SklearnLearner(LogisticRegression())
                learner.fit(X[1:9], y[1:9], X, y, task="classification", seed=0, features=features)
                learner.save(Path(name), example=X.head(), metadata={})
            except UserError as error:
                lines[name] = str(error)
        print(json.dumps(lines))
    """
    lines = in_project(own, code, json.dumps(list(FAULTS)))
    for name, words in FAULTS.items():
        assert re.search(words, lines[name]) and "\n" not in lines[name], (name, lines[name])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("project.features.nope", "features._target_=project.features.nope does not exist"),
        ("project.broken.make_nan", "project.broken.nan returns NaN in column 'ratio'"),
    ],
)
def test_a_step_with_a_fault_ends_in_one_line_with_exit_code_2(own: Project, target: str, words: str):
    result = own.step("train", *DATA, "model=sklearn_sgd", "features=none", f"features._target_={target}", code=2)
    assert words in result.stderr.strip().splitlines()[-1] and "Traceback" not in result.stderr


def test_a_model_of_the_team_on_the_original_columns(own: Project, tmp_path: Path):
    (own.root / "project/models.py").write_text(
        """
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.pipeline import make_pipeline
from project.features import Cities

def make_model(max_iter=5):
    columns = make_column_transformer((Cities(["Bonn", "Lyon"]), ["city"]), ("passthrough", ["price"]))
    return make_pipeline(columns, HistGradientBoostingClassifier(max_iter=max_iter))
"""
    )
    model = ["model=sklearn", "model.estimator._target_=project.models.make_model", "+model.estimator.max_iter=9"]
    folder = own.root / "raw"
    own.step("train", *DATA, "features=none", *model, f"save_to={folder}")
    own.step("score", f"model_uri={folder}", "input=new.csv", f"output={tmp_path}/answers.csv")
    answers = pd.read_csv(tmp_path / "answers.csv")["prediction"].tolist()
    assert answers == stock_answers(folder, own.root / "new.csv", tmp_path / "elsewhere")
    assert set(answers) == {"yes", "no"}


# --- the copy in the model is not run ---


def test_the_copy_in_the_model_is_never_imported(own: Project, tmp_path: Path):
    """Our steps and the server create `project` objects from the checkout, whatever the copy in the model contains."""
    folder, marker = download(own, tmp_path / "model"), tmp_path / "marker"
    for file in (folder / "code/project").glob("*.py"):
        file.write_text(f"open({str(marker)!r}, 'w')\n{file.read_text()}")
    own.step("score", f"model_uri={folder}", "input=new.csv", f"output={tmp_path}/answers.csv")
    code = """if True:
        import sys
        from pathlib import Path
        from alacarte.serving.model import ServedModel
        model = ServedModel.load_tried(Path(sys.argv[1]), False)
        model.find_fast_path()
        print(json.dumps([model.path_in_use])) if (json := __import__("json")) else None
    """
    assert in_project(own, code, str(folder)) == ["frame"]
    assert not marker.exists()
    stock_answers(folder, own.root / "new.csv", tmp_path / "elsewhere")
    assert marker.exists(), "stock MLflow runs the copy"


def refusal_elsewhere(own: Project, folder: Path, more_features: str = "") -> str:
    """The line with which `score` ends in another checkout, with more code in project/features.py."""
    other = Project(copy_project(folder / "other"), own.uri)
    (other.root / "project/features.py").open("a").write(more_features)
    names = (f"model_uri={download(own, folder / 'model')}", f"input={own.root}/new.csv", f"output={folder}/a.csv")
    return other.step("score", *names, code=2).stderr.strip().splitlines()[-1]


def test_a_model_whose_classes_are_not_in_the_checkout_is_refused(own: Project, tmp_path: Path):
    line = refusal_elsewhere(own, tmp_path)
    assert "is no function at the top level of a module of this checkout" in line


def test_code_that_changed_since_the_training_is_noticed(own: Project, tmp_path: Path):
    """The checkout's code would give other inputs to the model than those that it was trained with."""
    line = refusal_elsewhere(own, tmp_path, FEATURES.replace("np.log1p(X", "-10 * np.log1p(X"))
    assert "not those logged with it: has its code in project/" in line and "train again" in line
