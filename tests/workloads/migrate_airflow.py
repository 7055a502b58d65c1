"""Takes the migrations of airflow (Alembic) one step at a time, for tests/it/workloads.rs.

Speaks as migrate_wagtail.py does.
"""

import contextlib
import gc
import os
import sys

os.environ["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] = "postgresql+psycopg2://postgres@{}:{}/{}".format(
    os.environ["WORKLOAD_HOST"], os.environ["WORKLOAD_PORT"], os.environ["WORKLOAD_DATABASE"]
)
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "false"
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "ERROR"
# Whatever is printed by others must not be taken for an answer.
answers, sys.stdout = sys.stdout, sys.stderr

from airflow import settings  # noqa: E402
from airflow.utils.db import _get_alembic_config  # noqa: E402
from alembic import command  # noqa: E402
from alembic.script import ScriptDirectory  # noqa: E402


def step(direction, config, revisions, done):
    if direction == "forward":
        if done == len(revisions):
            return "end", done
        command.upgrade(config, revisions[done])
        return revisions[done], done + 1
    if done == 0:
        return "end", done
    command.downgrade(config, revisions[done - 2] if done > 1 else "base")
    return revisions[done - 1], done - 1


def main():
    config = _get_alembic_config()
    script = ScriptDirectory.from_config(config)
    revisions = [revision.revision for revision in script.walk_revisions()][::-1]
    done = 0
    for line in sys.stdin:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                answer, done = step(line.strip(), config, revisions, done)
        except Exception as error:  # Whatever the application raises is the answer.
            answer = "failed: " + f"{type(error).__name__}: {error}".replace("\n", " ")
        # What failed must not leave a transaction open that the next step waits for.
        settings.Session.remove()
        gc.collect()
        settings.engine.dispose()
        print(answer, file=answers, flush=True)


main()
