"""Policies that settings can name. A new one is a file beside this one and a line here."""

from typing import Final

from cortex.fleet.policies import least_outstanding, power_of_two, prefix_affine
from cortex.fleet.policies.policy import Policy

POLICIES: Final[dict[str, Policy]] = {
    policy.name: policy for policy in (prefix_affine.POLICY, least_outstanding.POLICY, power_of_two.POLICY)
}
