"""Writes into a Delta table as anybody might: foreign.py TABLE ACTION [ARGUMENT]"""

import sys

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Field, write_deltalake
from deltalake.schema import PrimitiveType
from deltalake.table import TableFeatures

path, action, *arguments = sys.argv[1:]
table = DeltaTable(path)


def some(rows=3):
    """A few rows of the table, as it has them."""
    return table.to_pyarrow_table().slice(0, rows)


def add_column(nullable):
    table.alter.add_columns([Field(f"note_{table.version()}", PrimitiveType("string"), nullable=nullable)])


def add_constraint():
    table.alter.add_constraint({f"positive_{table.version()}": "bin_count >= -1"})


actions = {
    # What takes rows away.
    "restore": lambda: table.restore(int(arguments[0]), protocol_downgrade_allowed=True),
    "delete": lambda: table.delete(arguments[0] if arguments else None),
    "overwrite": lambda: write_deltalake(path, some(0), mode="overwrite"),
    "replace": lambda: write_deltalake(path, some(0), mode="overwrite", predicate=arguments[0]),
    "update": lambda: table.update(updates={"bin_count": "bin_count + 1"}, predicate=arguments[0]),
    "merge": lambda: table.merge(some(), "s.feature = t.feature", source_alias="s", target_alias="t")
    .when_matched_delete()
    .execute(),
    # What does not.
    "compact": lambda: table.optimize.compact(),
    "z_order": lambda: table.optimize.z_order(["feature"]),
    "properties": lambda: table.alter.set_table_properties({"delta.appendOnly": "false"}),
    "constraint": add_constraint,
    "column": lambda: add_column(True),
    "comment": lambda: table.alter.set_table_description("What Highwater archives"),
    "name": lambda: table.alter.set_table_name("drift"),
    "metadata": lambda: table.alter.set_column_metadata("feature", {"comment": "What drifts"}),
    "append": lambda: write_deltalake(path, some(0), mode="append", commit_properties=CommitProperties()),
    "checkpoint": lambda: table.create_checkpoint(),
    "vacuum": lambda: table.vacuum(0, enforce_retention_duration=False, dry_run=False, full=True),
    "repair": lambda: table.repair(),
    # What makes the table unusable for us.
    "feature": lambda: table.alter.add_feature(
        TableFeatures.DeletionVectors, allow_protocol_versions_increase=True
    ),
    "drop": lambda: write_deltalake(
        path, some(0).drop_columns(["bin_count"]), mode="overwrite", schema_mode="overwrite"
    ),
    "version": lambda: None,
}
result = actions[action]()
print(DeltaTable(path).version())
