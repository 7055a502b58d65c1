"""Takes the migrations of wagtail (Django) one step at a time, for tests/it/workloads.rs.

Reads `forward` or `back` on standard input, answers with the name of the migration that was applied or taken back, with
`failed: why`, or with `end` when there is nothing left in that direction.
"""

import os
import sys

import django
from django.conf import settings

settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": os.environ["WORKLOAD_HOST"],
            "PORT": os.environ["WORKLOAD_PORT"],
            "USER": "postgres",
            "NAME": os.environ["WORKLOAD_DATABASE"],
        }
    },
    INSTALLED_APPS=[
        "wagtail.contrib.forms",
        "wagtail.contrib.redirects",
        "wagtail.contrib.search_promotions",
        "wagtail.contrib.settings",
        "wagtail.embeds",
        "wagtail.sites",
        "wagtail.users",
        "wagtail.snippets",
        "wagtail.documents",
        "wagtail.images",
        "wagtail.search",
        "wagtail.admin",
        "wagtail",
        "modelcluster",
        "taggit",
        "django.contrib.admin",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "django.contrib.messages",
        "django.contrib.postgres",
    ],
    SECRET_KEY="none",
    STATIC_URL="/static/",
    USE_TZ=True,
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    WAGTAILADMIN_BASE_URL="http://localhost",
)
django.setup()

from django.db import connection  # noqa: E402
from django.db.migrations.executor import MigrationExecutor  # noqa: E402


def step(direction, plan, done):
    if direction == "forward":
        if done == len(plan):
            return "end", done
        target = plan[done]
    else:
        if done == 0:
            return "end", done
        app, _ = plan[done - 1]
        before = [name for name in plan[: done - 1] if name[0] == app]
        target = before[-1] if before else (app, None)
    executor = MigrationExecutor(connection)
    executor.migrate([target])
    moved = plan[done] if direction == "forward" else plan[done - 1]
    return ".".join(moved), done + (1 if direction == "forward" else -1)


def main():
    graph = MigrationExecutor(connection).loader.graph
    plan = [(m.app_label, m.name) for m, _ in MigrationExecutor(connection).migration_plan(graph.leaf_nodes())]
    done = 0
    for line in sys.stdin:
        try:
            answer, done = step(line.strip(), plan, done)
        except Exception as error:  # Whatever the application raises is the answer.
            answer = "failed: " + f"{type(error).__name__}: {error}".replace("\n", " ")
        print(answer, flush=True)


main()
