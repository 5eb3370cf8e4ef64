"""Where a run keeps its goods: on local disk or in an object store, whole or not at all."""

from cdpo_ray.store.copies import copy, copy_tree, delete, describe, link, local_copy, move, refuse_full_disk
from cdpo_ray.store.failures import storage_errors_within
from cdpo_ray.store.folder import HOW_TO_MEND, RunFolder, StepOutput, differences
from cdpo_ray.store.manifests import CONFIG, FILES_MANIFEST, fingerprint_of, flat
from cdpo_ray.store.places import (
    MANIFEST,
    exists,
    files_within,
    is_local,
    make_folder,
    new_file,
    place,
    read_json,
    write_json,
    write_text,
)
from cdpo_ray.store.tables import (
    arrow_place,
    count_rows,
    read_shards,
    read_table,
    shard_schema,
    table_schema,
    write_table,
    write_tables,
)
from cdpo_ray.store.untrusted import path_within, read_untrusted, validate_untrusted

__all__ = [
    "CONFIG",
    "FILES_MANIFEST",
    "HOW_TO_MEND",
    "MANIFEST",
    "RunFolder",
    "StepOutput",
    "arrow_place",
    "copy",
    "copy_tree",
    "count_rows",
    "delete",
    "describe",
    "differences",
    "exists",
    "files_within",
    "fingerprint_of",
    "flat",
    "is_local",
    "link",
    "local_copy",
    "make_folder",
    "move",
    "new_file",
    "path_within",
    "place",
    "read_json",
    "read_shards",
    "read_table",
    "read_untrusted",
    "refuse_full_disk",
    "shard_schema",
    "storage_errors_within",
    "table_schema",
    "validate_untrusted",
    "write_json",
    "write_table",
    "write_tables",
    "write_text",
]
