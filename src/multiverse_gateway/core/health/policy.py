"""The figures by which a server's health is judged."""

from enum import StrEnum

from attrs import frozen


class AutoDeregister(StrEnum):
    """What happens to a server after too many failed probes in a row. `DELETE` deactivates too; the monitor then removes it."""

    DEACTIVATE = "deactivate"
    DELETE = "delete"
    OFF = "off"


@frozen(kw_only=True)
class HealthPolicy:
    """The figures of the state machine; all but the two counts are seconds.

    `verdict_age` is how long a verdict from before a restart is trusted.
    """

    max_consecutive_failures: int = 3
    strikes: int = 3
    interval: float = 60.0
    timeout: float = 10.0
    resting_default: float = 1.0
    longest_default: float = 10.0
    resting_cap: float = 60.0
    pair_rest: float = 60.0
    unsupported_for: float = 600.0
    slow_start: float = 30.0
    strike_memory: float = 30.0
    doubt: float = 30.0
    longest_doubt: float = 300.0
    archive_after: float = 604800.0
    auto_deregister: AutoDeregister = AutoDeregister.DEACTIVATE
    first_byte_timeout: float = 120.0
    verdict_age: float = 60.0
