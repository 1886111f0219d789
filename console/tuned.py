"""Which policy file goes with a model: the one that the user named, or what is remembered for the model."""

from __future__ import annotations

from fastkv.console.policy_file import PolicyFile, remembered_policy, remembers


def tuned_policy(model: str, revision: str | None, named: PolicyFile | None) -> PolicyFile | None:
    """The policy file that the user named, or what is remembered for the model; FastKVError for another model's."""
    if named is None and not remembers():
        return None
    from fastkv.console.machine import fingerprint
    from fastkv.models.hub import model_folder

    folder = model_folder(model, revision)
    try:
        files = fingerprint(folder)
    except OSError:
        return named  # the model cannot be read: loading it will say so
    tuned = remembered_policy(files) if named is None else named
    if tuned is not None:
        tuned.check_model(files)
    return tuned
