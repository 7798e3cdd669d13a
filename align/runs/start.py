"""A policy that begins with what an earlier run trained."""

from align.errors import UserError
from align.model.policy import Policy
from align.runs.run_directory import RunDirectory


def start_from(run: str | None, policy: Policy) -> None:
    """Put what a run trained, if one is given, into a policy; the reference stays the policy's own."""
    if run is None:
        return
    state = RunDirectory(run).final_state()
    if not RunDirectory(run).summary.exists():
        raise UserError(f"policy.start_run: the run in {run} is not finished; let `align train` end it")
    # A frozen start that the policy was loaded with is the reference, whatever the run's own was.
    policy.load_state(state, keep_reference=policy.adapter == "start_adapter")
