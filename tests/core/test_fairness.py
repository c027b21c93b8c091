"""The fair queue: what any client can do to the others, and what is left when all requests have ended."""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from multiverse_gateway.core.fairness import (
    CLOSING_SECONDS,
    MAX_COST,
    MODEL_CHANGE_SECONDS,
    OTHERS_SECONDS,
    STEPS,
    USUAL_OUTPUT_TOKENS,
    AtOnce,
    Band,
    FairQueue,
    Flow,
    Place,
    Pool,
    QueueCounts,
    Share,
    Ticket,
    actual_cost,
    estimated_cost,
    in_steps,
    jain,
)

MODEL = "llama"
COSTS = st.integers(1, 1000)


@attrs.define(eq=False)
class Task:
    """A request of a known price."""

    cost: float = 100.0
    estimate: float | None = None
    needs: object = None

    def estimated_cost(self) -> float:
        return self.cost if self.estimate is None else self.estimate

    def actual_cost(self) -> float:
        return self.cost


def ticket(client: str, cost: float = 100.0, *, estimate: float | None = None, band: Band = Band.INTERACTIVE, **fields: object) -> Ticket:
    """Return a request of a client; `fields` are the needs, the model and the weight."""
    needs = fields.pop("needs", None)
    return Ticket(str(fields.pop("model", MODEL)), Flow(client, band), Task(cost, estimate, needs), **fields)  # type: ignore[arg-type]


def make_queue(slots: int | None = None, **fields: int) -> FairQueue:
    """Return a queue for one server; without `slots` there are no shares of them."""
    queue = FairQueue(**fields)
    queue.serve({"lab": Pool((MODEL,), slots)})
    return queue


def fill(queue: FairQueue, slots: int, now: float = 0.0) -> list[Ticket]:
    """Begin the requests whose turn it is, as long as fewer run than there are slots; return them."""
    began = []
    while queue.counts(MODEL).running < slots and (found := queue.pick(MODEL, now)) is not None:
        queue.begin(found, now, "lab")
        began.append(found)
    return began


def flows(queue: FairQueue, name: str) -> set[Flow]:
    """Return the flows of a model of which the queue knows anything."""
    model = queue._models.get(name)
    if model is None:
        return set()
    return {*(() if model.books is None else model.books.accounts), *(each.flow for each in model.live)}


def join_all(queue: FairQueue, tickets: Sequence[Ticket], now: float = 0.0) -> None:
    for each in tickets:
        queue.join(each, now)


def is_empty(queue: FairQueue) -> bool:
    """Return whether nothing is left of any request."""
    models = queue._models.values()
    return not queue.anybody_waits and not any(model.live or model.running or model.books for model in models)


# Costs


@pytest.mark.parametrize(
    ("body_bytes", "max_tokens", "generates", "cost"),
    [
        (400, 50, True, 200),
        (400, None, True, 100 + 2 * 300),
        (400, 1_000_000, True, 100 + 2 * 2048),
        (400, -5, True, 100),
        (20 << 20, 50, True, 8192 + 100),
        (20 << 20, 50, False, 5 << 20),
    ],
)
def test_a_request_is_estimated_by_its_size_and_its_limit(body_bytes: int, max_tokens: int | None, generates: bool, cost: float) -> None:
    """An image or a bold `max_tokens` costs no more than a large request; embeddings cost what they hold."""
    assert estimated_cost(body_bytes, max_tokens=max_tokens, mean_output_tokens=300.0, generates=generates) == cost


@pytest.mark.parametrize(
    ("body_bytes", "sent_bytes", "usage", "events", "generates", "cost"),
    [
        (400, 900, (90, 20), 25, True, 130),
        (400, 900, (0, 0), 20, True, 140),
        (400, 900, (0, 0), 0, True, 100 + 2 * 225),
        (400, 900, (10**18, 10**18), 0, True, 400 + 2 * 900),
        (400, 900, (-1, -1), 0, True, 100 + 2 * 225),
        (400, 0, (90, 0), 0, True, 90),
        (40_000, 900, (0, 0), 0, False, 10_000),
        (40_000, 900, (9000, 5), 0, False, 9000),
    ],
)
def test_what_a_request_has_cost(
    body_bytes: int, sent_bytes: int, usage: tuple[int, int], events: int, generates: bool, cost: float
) -> None:
    """The server's report counts, as far as it can be true; without one, events and bytes do."""
    assert actual_cost(body_bytes, sent_bytes, usage=usage, events=events, generates=generates) == cost


# Order


def test_a_single_request_goes_before_a_flood() -> None:
    """A script with 100 requests does not delay a person with a later request by more than the request that runs."""
    queue = make_queue()
    join_all(queue, [ticket("script") for _ in range(100)])
    (running,) = fill(queue, 1)
    person = ticket("person")
    queue.join(person, 1.0)
    queue.end(running, 2.0)
    assert fill(queue, 1, 2.0) == [person]


def test_requests_of_one_client_keep_their_order() -> None:
    """Within a flow the queue is first come, first served."""
    queue = make_queue()
    tickets = [ticket("script", cost) for cost in (900, 5, 300, 20)]
    join_all(queue, tickets)
    assert queue.order(MODEL) == tickets
    assert fill(queue, 4) == tickets


def test_of_equal_clients_the_one_that_waits_longer_goes_first() -> None:
    """Clients without any use are served in the order in which they came."""
    queue = make_queue()
    tickets = [ticket(client) for client in "abc"]
    join_all(queue, tickets)
    assert fill(queue, 3) == tickets


def test_joining_again_keeps_the_place() -> None:
    """A request that waits already is not queued twice."""
    queue = make_queue()
    first, second = ticket("a"), ticket("b")
    join_all(queue, [first, second, first])
    assert (queue.order(MODEL), queue.waiting(MODEL)) == ([first, second], 2)


def test_models_have_queues_of_their_own() -> None:
    """A flood for one model costs its client nothing at another one."""
    queue = FairQueue()
    join_all(queue, [ticket("script") for _ in range(5)] + [ticket("script", model="phi"), ticket("person", model="phi")])
    assert queue.lengths() == {MODEL: 5, "phi": 2}
    assert queue.order("phi")[0].flow.client == "script"
    assert queue.lengths_by_band() == {(MODEL, Band.INTERACTIVE): 5, ("phi", Band.INTERACTIVE): 2}


def test_a_model_without_requests_has_no_queue() -> None:
    """Questions about a model that nobody has used have answers."""
    queue = make_queue()
    for name in (MODEL, "unknown"):
        assert queue.pick(name, 0.0) is None
        assert queue.pick_for(name, 0.0) is None
        assert (queue.waiting(name), queue.order(name), queue.places(name, 0.0), flows(queue, name)) == (0, [], {}, set())
        assert queue.mean_output_tokens(name) == USUAL_OUTPUT_TOKENS
        assert queue.until_next_end(name, Flow("a")) is None
        assert queue.overflow(name) is None
        assert queue.may_begin(ticket("a", model=name), 0.0)
    assert queue.counts("unknown") == QueueCounts(slots=0, running=0, waiting=0, clients_waiting=0)
    queue.learn("unknown", seconds=1.0, output_tokens=1.0)
    assert queue.mean_output_tokens("unknown") == USUAL_OUTPUT_TOKENS


def test_a_stranger_may_leave_and_end() -> None:
    """A request that never came to the queue need not know that."""
    queue = make_queue()
    stranger = ticket("a")
    queue.leave(stranger, 0.0)
    queue.release(stranger)
    queue.end(stranger, 0.0)
    assert is_empty(queue)


def test_a_newcomer_does_not_overtake() -> None:
    """While a request waits for the model, a new one joins the queue, whatever is free."""
    queue = make_queue()
    waiting, newcomer = ticket("a"), ticket("b")
    queue.join(waiting, 0.0)
    assert not queue.may_begin(newcomer, 0.0)
    queue.begin(waiting, 0.0)
    assert queue.may_begin(newcomer, 0.0)


def test_the_first_wait_charges_what_runs() -> None:
    """Requests that began while slots were free count as soon as one has to wait."""
    queue = make_queue()
    for _ in range(3):
        queue.begin(ticket("script"), 0.0)
    queue.begin(ticket("person", 10.0), 0.0)
    script, person, newcomer = ticket("script"), ticket("person"), ticket("newcomer")
    join_all(queue, [script, person, newcomer], 1.0)
    assert queue.order(MODEL) == [newcomer, person, script]


def test_a_request_that_need_not_wait_is_charged_from_the_clock_on() -> None:
    """Once requests had to wait, one that begins at once pays as if it had waited, too."""
    queue = make_queue()
    join_all(queue, [ticket("busy") for _ in range(10)])
    fill(queue, 10)
    queue.begin(ticket("person", 500.0), 0.0)
    person, busy = ticket("person"), ticket("busy")
    join_all(queue, [person, busy], 1.0)
    assert queue.order(MODEL) == [busy, person]


# Fairness


@attrs.define(eq=False)
class Greedy:
    """Clients that always have requests waiting, at so many slots."""

    queue: FairQueue
    slots: int
    weights: dict[str, float]
    prices: random.Random
    dearest: int
    lies: bool
    served: dict[str, float] = attrs.field(init=False)
    running: list[Ticket] = attrs.field(factory=list)
    now: float = 0.0

    def __attrs_post_init__(self) -> None:
        self.served = dict.fromkeys(self.weights, 0.0)
        for client in self.weights:
            for _ in range(self.slots + 1):
                self._ask(client)
        self.running += fill(self.queue, self.slots)

    def _ask(self, client: str) -> None:
        cost = self.prices.randint(1, self.dearest)
        estimate = self.prices.randint(1, self.dearest) if self.lies else None
        self.queue.join(ticket(client, cost, estimate=estimate, weight=self.weights[client]), self.now)

    def end_one(self, number: int) -> None:
        """End a request that runs; its client sends another one."""
        self.now += 1.0
        over = self.running.pop(number % len(self.running))
        client = over.flow.client
        self.served[client] += over.request.actual_cost() / over.weight
        self.queue.end(over, self.now)
        self._ask(client)
        self.running += fill(self.queue, self.slots, self.now)


@given(
    slots=st.integers(1, 4),
    weights=st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0]), min_size=2, max_size=4),
    ends=st.integers(20, 120),
    seed=st.integers(0, 2**32),
    lies=st.booleans(),
)
@settings(max_examples=60)
def test_the_difference_between_two_busy_clients_is_bounded(slots: int, weights: list[float], ends: int, seed: int, lies: bool) -> None:
    """Over any interval, two clients that always wait get the same per weight, but for what runs: 2 * slots * dearest request."""
    dearest = 1000
    names = {f"client {number}": weight for number, weight in enumerate(weights)}
    greedy = Greedy(make_queue(), slots, names, random.Random(seed), dearest, lies)
    most: dict[tuple[str, str], float] = {}
    least: dict[tuple[str, str], float] = {}
    for _ in range(ends):
        greedy.end_one(greedy.prices.randrange(slots))
        for one in names:
            for other in names:
                difference = greedy.served[one] - greedy.served[other]
                most[one, other] = max(difference, most.get((one, other), 0.0))
                least[one, other] = min(difference, least.get((one, other), 0.0))
    bound = 2 * slots * dearest / min(weights)
    assert all(most[pair] - least[pair] <= bound for pair in most)


@pytest.mark.parametrize("slots", [1, 4])
def test_twice_the_weight_is_twice_the_service(slots: int) -> None:
    """Shares follow weights within one point of a hundred."""
    greedy = Greedy(make_queue(), slots, {"a": 2.0, "b": 1.0, "c": 1.0}, random.Random(1), 1000, lies=True)
    for number in range(3000):
        greedy.end_one(number)
    tokens = {client: served * greedy.weights[client] for client, served in greedy.served.items()}
    assert tokens["a"] / sum(tokens.values()) == pytest.approx(0.5, abs=0.01)
    assert jain(greedy.served.values()) > 0.999


@given(
    slots=st.integers(1, 4),
    floods=st.lists(st.lists(st.tuples(COSTS, COSTS), min_size=1, max_size=12), max_size=6),
    seed=st.integers(0, 2**32),
    before=st.integers(0, 30),
)
@settings(max_examples=60)
def test_nobody_starves(slots: int, floods: list[list[tuple[int, int]]], seed: int, before: int) -> None:
    """With n clients, S slots and T seconds of the longest request, a client's only request waits T + (n - 1) * T / S at most."""
    queue = make_queue()
    chance, longest = random.Random(seed), 10.0
    running: list[tuple[float, int, Ticket]] = []

    def begin(now: float) -> list[Ticket]:
        began = fill(queue, slots, now)
        running.extend((now + chance.uniform(0.1, longest), each.number, each) for each in began)
        return began

    def end_first() -> float:
        first = min(running)
        running.remove(first)
        queue.end(first[2], first[0])
        return first[0]

    for number, flood in enumerate(floods):
        join_all(queue, [ticket(f"script {number}", cost, estimate=estimate) for cost, estimate in flood])
    begin(0.0)
    now = 0.0
    for _ in range(min(before, sum(map(len, floods)) - slots)):
        now = end_first()
        begin(now)
    person = ticket("person")
    queue.join(person, now)
    arrived = now
    while person not in begin(now):
        now = end_first()
    assert now - arrived <= longest + len(floods) * longest / slots + 1e-6


@given(st.lists(st.tuples(st.sampled_from("abcd"), COSTS, st.booleans()), max_size=40), st.integers(0, 10))
def test_the_position_is_what_brute_force_finds(requests: list[tuple[str, int, bool]], began: int) -> None:
    """A request's position is the turn at which it begins if no other request comes."""
    queue = make_queue()
    for client, cost, fails_over in requests:
        each = ticket(client, cost, weight=2.0 if client == "a" else 1.0)
        if fails_over:
            queue.begin(each, 0.0)
            queue.release(each)
        queue.join(each, 0.0)
    fill(queue, began)
    order = queue.order(MODEL)
    places = queue.places(MODEL, 0.0)
    assert list(places) == order
    assert [place.position for place in places.values()] == list(range(1, len(order) + 1))
    assert all(place.waiting == len(order) for place in places.values())
    assert fill(queue, 1000) == order


@pytest.mark.parametrize("is_polite", [False, True])
def test_idleness_earns_no_credit(is_polite: bool) -> None:
    """A client that did nothing for long gets one turn, then its share; so does one that has waited all the time."""
    queue = make_queue()
    join_all(queue, [ticket("busy") for _ in range(60)])
    now, running = 0.0, fill(queue, 1)
    if is_polite:
        early = ticket("late", 100.0)
        queue.join(early, 0.0)
        queue.leave(early, 0.0)
        queue.end(early, 0.0)
    for _ in range(30):
        now += 1.0
        queue.end(running.pop(), now)
        running = fill(queue, 1, now)
    join_all(queue, [ticket("late") for _ in range(20)], now)
    turns = []
    for _ in range(20):
        now += 1.0
        queue.end(running.pop(), now)
        running = fill(queue, 1, now)
        turns += [each.flow.client for each in running]
    assert turns == ["late", "busy"] * 10


def test_a_short_pause_makes_nothing_cheaper() -> None:
    """The counter of a client without requests is kept until the clock has passed it."""
    queue = make_queue()
    greedy = ticket("greedy", 5000)
    join_all(queue, [greedy, *[ticket("other", 10) for _ in range(3)]])
    assert fill(queue, 1) == [greedy]
    queue.end(greedy, 1.0)
    assert flows(queue, MODEL) == {Flow("greedy"), Flow("other")}
    again = ticket("greedy", 5000)
    queue.join(again, 1.0)
    assert queue.order(MODEL)[-1] is again


def test_idle_computers_may_be_used_without_debt() -> None:
    """A client that had everything while no other came is at the clock like a newcomer, but for what it runs."""
    queue = make_queue()
    now = 0.0
    queue.join(ticket("stays"), now)
    (stays,) = fill(queue, 1)
    for _ in range(50):
        each = ticket("greedy", 900)
        queue.begin(each, now)
        queue.end(each, now)
    greedy, newcomer = ticket("greedy", 900), ticket("newcomer", 900)
    join_all(queue, [newcomer, greedy], now)
    assert queue.order(MODEL) == [newcomer, greedy]
    assert queue._models[MODEL].books is not None
    assert greedy.use is stays.use


def test_a_wrong_estimate_is_corrected() -> None:
    """A client whose requests turn out cheap goes on at once; one whose requests turn out dear has to wait."""
    queue = make_queue()
    cheap, dear = [[ticket(client, cost, estimate=500) for _ in range(4)] for client, cost in (("cheap", 1), ("dear", 2000))]
    join_all(queue, [*dear, *cheap])
    order = []
    for now in range(8):
        (running,) = fill(queue, 1, now)
        order.append(running.flow.client)
        queue.end(running, now)
    assert order == ["dear", "cheap", "cheap", "cheap", "cheap", "dear", "dear", "dear"]


def test_a_request_that_no_server_answered_is_refunded_whole() -> None:
    """A client pays nothing for failures."""
    queue = make_queue()
    failing = ticket("a", 0, estimate=900)
    join_all(queue, [failing, ticket("a", 100), ticket("b", 100)])
    assert fill(queue, 1) == [failing]
    queue.end(failing, 1.0)
    assert [each.flow.client for each in queue.order(MODEL)] == ["b", "a"]
    assert queue._models[MODEL].books.accounts[Flow("a")].counter == 0  # type: ignore[union-attr]


# Failing over, and what cannot use a free slot


def test_a_request_that_fails_over_keeps_its_place_and_its_charge() -> None:
    """It goes before all that came later, also before its own client's, and is charged once."""
    queue = make_queue()
    first = ticket("a", 300)
    queue.begin(first, 0.0)
    join_all(queue, [ticket("a", 300), ticket("b", 300)], 1.0)
    queue.release(first)
    queue.join(first, 2.0)
    assert queue.order(MODEL)[0] is first
    assert queue.pick(MODEL, 2.0) is first
    queue.begin(first, 2.0)
    assert queue._models[MODEL].books.accounts[Flow("a")].counter == 300  # type: ignore[union-attr]
    assert first.waited_seconds == 0.0


def test_a_retry_without_a_wait_is_not_charged_again() -> None:
    """The charge belongs to the request, not to the attempt."""
    queue = make_queue()
    first = ticket("a", 300)
    queue.join(first, 0.0)
    for _ in range(3):
        queue.begin(first, 0.0)
        queue.release(first)
    assert queue._models[MODEL].books.accounts[Flow("a")].counter == 300  # type: ignore[union-attr]
    queue.end(first, 1.0)
    assert is_empty(queue)


def test_a_request_that_cannot_use_what_is_free_keeps_its_place() -> None:
    """A stream that waits for another server holds up neither other clients nor its own."""
    queue = make_queue()
    stream, plain, other = ticket("a", needs="streams"), ticket("a"), ticket("b", needs="streams")
    join_all(queue, [stream, other, plain])
    assert queue.pick(MODEL, 0.0) is stream
    assert queue.pick(MODEL, 0.0, unmet={"streams"}) is plain
    assert queue.pick(MODEL, 0.0, unmet={"streams", None}) is None
    queue.begin(plain, 0.0)
    assert queue.order(MODEL) == [other, stream]


@pytest.mark.parametrize("by_pool", [False, True])
def test_free_slots_are_offered_in_turn(by_pool: bool) -> None:
    """Each request is asked once, and after one that cannot use what is free no other with equal needs; one that ends is gone."""
    queue = make_queue()
    kinds = [None, "streams", "dies", "streams", None, None]
    tickets = [ticket(client, needs=needs) for client, needs in zip("abcdef", kinds, strict=True)]
    join_all(queue, tickets)
    asked: list[Ticket] = []

    def take(each: Ticket) -> None:
        asked.append(each)
        if each.request.needs == "dies":
            queue.end(each, 0.0)
        elif each.request.needs is None and queue.counts(MODEL).running < 2:
            queue.begin(each, 0.0)

    if by_pool:
        queue.give_turns_for("lab", 0.0, take)
    else:
        queue.give_turns(MODEL, 0.0, take)
    assert asked == [tickets[0], tickets[1], tickets[2], tickets[4], tickets[5]]
    assert queue.order(MODEL) == [tickets[1], tickets[3], tickets[5]]


def test_a_flow_that_may_not_go_saves_up_one_large_request_at_most() -> None:
    """A client whose needs are not met for long does not lock out the others once they are."""
    queue = make_queue()
    join_all(queue, [ticket("a", needs="streams") for _ in range(400)] + [ticket("b", 1000) for _ in range(50)])
    for now in range(49):
        found = queue.pick(MODEL, now, unmet={"streams"})
        assert found is not None
        queue.begin(found, now)
        queue.end(found, now)
    queue.pick(MODEL, 60.0, unmet={"streams"})
    books = queue._models[MODEL].books
    assert books is not None
    assert books.accounts[Flow("a")].counter == books.clock - MAX_COST


# Too many


def test_the_newest_request_of_the_longest_line_is_dropped() -> None:
    """A full queue takes a person in, at the cost of the script."""
    queue = make_queue(max_waiting=4)
    script = [ticket("script") for _ in range(4)]
    join_all(queue, script)
    assert queue.overflow(MODEL) is None
    person = ticket("person")
    queue.join(person, 1.0)
    assert queue.overflow(MODEL) is script[-1]
    queue.end(script[-1], 1.0)
    assert (queue.overflow(MODEL), queue.waiting(MODEL)) == (None, 4)


def test_who_fills_the_queue_is_refused() -> None:
    """If the newcomer's client has the most requests in the queue, the newcomer is dropped; so it is among equals."""
    queue = make_queue(max_waiting=3)
    join_all(queue, [ticket("script"), ticket("script"), ticket("person")])
    newcomer = ticket("script")
    queue.join(newcomer, 1.0)
    assert queue.overflow(MODEL) is newcomer
    queue = make_queue(max_waiting=3)
    join_all(queue, [ticket(client) for client in "abc"])
    newcomer = ticket("d")
    queue.join(newcomer, 1.0)
    assert queue.overflow(MODEL) is newcomer


def test_weight_counts_for_places_too() -> None:
    """A client with twice the weight may have twice as many requests in the queue."""
    queue = make_queue(max_waiting=4)
    heavy = [ticket("heavy", weight=2.0) for _ in range(3)]
    light = [ticket("light") for _ in range(2)]
    join_all(queue, [*light, *heavy])
    assert queue.overflow(MODEL) is light[-1]


def test_a_request_that_fails_over_is_dropped_last() -> None:
    """It has a place already; only where no request may wait at all it loses it."""
    queue = make_queue(max_waiting=1)
    old, person = [ticket("script") for _ in range(2)], ticket("person")
    for each in old:
        queue.begin(each, 0.0)
        queue.release(each)
    join_all(queue, [person, *old])
    assert queue.overflow(MODEL) is person
    queue.max_waiting = 0
    queue.end(person, 0.0)
    assert queue.overflow(MODEL) is old[-1]


# Shares of slots


def test_one_client_holds_half_of_the_slots_while_others_are_there() -> None:
    """Alone it has everything, until two minutes after another one came last it has half, rounded up."""
    queue = make_queue(slots=5)
    join_all(queue, [ticket("script") for _ in range(9)])
    assert len(fill(queue, 5)) == 5
    queue = make_queue(slots=5)
    person = ticket("person")
    queue.begin(person, 0.0)
    queue.end(person, 1.0)
    script = [ticket("script") for _ in range(9)]
    assert queue.may_begin(script[0], 1.0)
    join_all(queue, script, 1.0)
    assert len(fill(queue, 5, 1.0)) == 3
    assert queue.pick(MODEL, OTHERS_SECONDS) is None
    assert len(fill(queue, 5, OTHERS_SECONDS + 1.5)) == 2


def test_a_client_with_a_long_request_is_there() -> None:
    """Another client counts as long as one of its requests runs, or waits."""
    queue = make_queue(slots=2)
    queue.begin(ticket("person"), 0.0)
    queue.begin(ticket("script"), 500.0)
    assert not queue.may_begin(ticket("script"), 1000.0)
    assert queue.may_begin(ticket("another"), 1000.0)


def test_newcomers_share_what_is_free() -> None:
    """A client at its share waits although slots are free; another client starts at once."""
    queue = make_queue(slots=4)
    queue.begin(ticket("person"), 0.0)
    for _ in range(2):
        queue.begin(ticket("script"), 0.0)
    script, another = ticket("script"), ticket("another")
    assert not queue.may_begin(script, 0.0)
    queue.join(script, 0.0)
    queue.join(another, 0.0)
    assert queue.pick(MODEL, 0.0) is another


@pytest.mark.parametrize(("slots", "bulk"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_bulk_requests_hold_a_quarter_beside_interactive_ones(slots: int, bulk: int) -> None:
    """All bulk requests together hold a quarter, rounded up, and always one; alone they have everything."""
    queue = make_queue(slots=slots)
    person = ticket("person")
    queue.begin(person, 0.0)
    queue.end(person, 0.5)
    join_all(queue, [ticket(f"script {number % 3}", band=Band.BULK) for number in range(30)], 1.0)
    assert len(fill(queue, slots, 1.0)) == bulk
    assert not queue.may_begin(ticket("script 0", band=Band.BULK), 1.0)
    assert fill(queue, slots, OTHERS_SECONDS + 0.5) == [] or bulk < slots


def test_an_interactive_request_that_runs_keeps_bulk_to_a_quarter() -> None:
    """However long ago it came; without any, bulk requests share as others do."""
    queue = make_queue(slots=4)
    person = ticket("script")
    queue.begin(person, 0.0)
    join_all(queue, [ticket("script", band=Band.BULK) for _ in range(9)], 1000.0)
    assert len(fill(queue, 4, 1000.0)) == 1
    queue.end(person, 1001.0)
    assert len(fill(queue, 4, 1001.0)) == 3
    assert queue.lengths_by_band() == {(MODEL, Band.BULK): 5}


def test_without_a_cap_or_a_limit_of_the_gateway_there_are_no_shares() -> None:
    """A server without a cap never makes anyone wait, so its slots cannot be shared."""
    queue = FairQueue()
    queue.serve({"a": Pool((MODEL,), 2), "b": Pool((MODEL,), None), "c": Pool((MODEL,), 2)})
    queue.begin(ticket("person"), 0.0)
    for band in Band:
        for _ in range(20):
            each = ticket("script", band=band)
            assert queue.may_begin(each, 0.0)
            queue.begin(each, 0.0)
    assert queue.counts(MODEL) == QueueCounts(slots=None, running=41, waiting=0, clients_waiting=0)


@pytest.mark.parametrize("capped", [False, True])
def test_without_a_cap_the_gateways_own_limit_is_shared(capped: bool) -> None:
    """People.md, ruling 3: all requests of a model together hold its slots of the gateway, and one client half of them beside others."""
    queue = FairQueue(uncapped_slots=4)
    queue.serve({"a": Pool((MODEL,), None), **({"b": Pool((MODEL,), 2)} if capped else {})})
    first = [ticket("script") for _ in range(3)]
    person = [ticket("person") for _ in range(2)]
    for each in (person[0], *first[:2]):
        assert queue.may_begin(each, 0.0)
        queue.begin(each, 0.0)
    assert queue.used_up(first[2], 0.0) is Share.CLIENT
    queue.begin(person[1], 0.0)
    another = ticket("another")
    assert (queue.used_up(another, 0.0), queue.may_begin(another, 0.0)) == (Share.MODEL, False)
    assert queue.counts(MODEL) == QueueCounts(slots=None, running=4, waiting=0, clients_waiting=0)
    join_all(queue, [first[2], another], 0.0)
    assert queue.pick(MODEL, 0.0) is None, "no share, wait or turn lets a fifth one begin"
    queue.release(first[0])
    assert (queue.used_up(another, 0.0), queue.pick(MODEL, 0.0)) == (None, another), "the person's share is not the script's"


def test_a_request_learns_which_share_keeps_it_waiting() -> None:
    """Its client's own, or that of all bulk requests; none while no server is in rotation."""
    queue = make_queue(slots=4)
    person, script, bulk = ticket("person"), ticket("script"), ticket("another", band=Band.BULK)
    assert queue.used_up(script, 0.0) is None
    for each in (person, *(ticket("script") for _ in range(2)), ticket("script", band=Band.BULK)):
        queue.begin(each, 0.0)
    assert [queue.used_up(each, 0.0) for each in (person, script, bulk)] == [None, Share.CLIENT, Share.BULK]
    queue.serve({})
    assert [queue.used_up(each, 0.0) for each in (person, script, bulk)] == [None, None, None]


def test_slots_of_a_model_are_those_of_its_servers() -> None:
    """Servers come and go; a model that no server serves keeps its waiting requests and is forgotten after the last one."""
    queue = FairQueue()
    queue.serve({"a": Pool((MODEL,), 2), "b": Pool((MODEL, "phi"), 3)})
    assert (queue.counts(MODEL).slots, queue.counts("phi").slots) == (5, 3)
    waiting = ticket("person")
    queue.join(waiting, 0.0)
    queue.serve({})
    assert (queue.counts(MODEL).slots, queue.order(MODEL), set(queue._models)) == (0, [waiting], {MODEL})
    assert queue.pick(MODEL, 0.0) is waiting
    queue.end(waiting, 1.0)
    queue.serve({})
    assert queue._models == {}


# Pools with several models


def shared_queue() -> FairQueue:
    """Return a queue for a computer with two models and one slot."""
    queue = FairQueue()
    queue.serve({"host": Pool((MODEL, "phi"), 1), "other": Pool(("qwen",), 1)})
    return queue


def test_a_pool_serves_the_least_counter_of_all_its_models() -> None:
    """Without a model that ran last, the first request of any model is next; a pool of one model looks there only."""
    queue = shared_queue()
    assert queue.pick_for("host", 0.0) is None
    phi, llama, qwen = ticket("a", model="phi"), ticket("b"), ticket("c", model="qwen")
    join_all(queue, [phi, llama, qwen])
    assert queue.pick_for("host", 0.0) is phi
    assert queue.pick_for("other", 0.0) is qwen
    assert queue.pick_for("unknown", 0.0) is None
    assert queue.pick_for("host", 0.0, unmet={None}) is None


def test_the_model_that_ran_last_goes_first_for_a_while() -> None:
    """A change of model reloads the engine: it has to wait until a request for another model has waited for 30 s."""
    queue = shared_queue()
    running = ticket("a")
    queue.begin(running, 0.0, "host")
    phi = ticket("b", model="phi")
    join_all(queue, [ticket("a"), ticket("a")], 0.0)
    queue.join(phi, 1.0)
    queue.end(running, 2.0)
    assert queue.pick_for("host", 2.0).model == MODEL  # type: ignore[union-attr]
    assert queue.pick_for("host", 1.0 + MODEL_CHANGE_SECONDS) is phi
    queue.serve({"host": Pool((MODEL, "phi"), 1)})
    assert queue.pick_for("host", 2.0).model == MODEL  # type: ignore[union-attr]
    queue.serve({"host": Pool(("phi",), 1)})
    assert queue.pick_for("host", 2.0) is phi


def test_an_idle_model_earns_no_credit_either() -> None:
    """A model that begins to wait is lifted to the clock of the model that it shares a computer with."""
    queue = shared_queue()
    join_all(queue, [ticket("a", 1000) for _ in range(30)])
    for now in range(20):
        (running,) = fill(queue, 1, now)
        queue.end(running, now)
    join_all(queue, [ticket("b", 1000, model="phi") for _ in range(10)], 20.0)
    turns = []
    for now in range(100, 110):
        found = queue.pick_for("host", now)
        assert found is not None
        queue.begin(found, now, "host")
        queue.end(found, now)
        turns.append(found.model)
    assert turns.count("phi") == 5


# What remains


def test_a_flow_is_forgotten_once_the_clock_has_passed_it() -> None:
    """Clients that came once leave nothing behind, even while others keep the model busy."""
    queue = make_queue()
    stays = [ticket("busy", 100) for _ in range(200)]
    join_all(queue, stays)
    for number in range(100):
        queue.join(ticket(f"client {number}", 100), number)
        for each in fill(queue, 2, number):
            queue.end(each, number)
    assert len(flows(queue, MODEL)) <= 3


def test_coming_and_leaving_fills_nothing() -> None:
    """A client that joins and leaves again and again is kept once, however often."""
    queue = make_queue()
    join_all(queue, [ticket("busy", 1) for _ in range(3)])
    fill(queue, 1)
    dear = ticket("a", 9000)
    queue.begin(dear, 0.0)
    queue.end(dear, 0.0)
    for now in range(100):
        each = ticket("a")
        queue.join(each, now)
        queue.end(each, now)
    books = queue._models[MODEL].books
    assert books is not None
    assert len(books.parked) == 1


def test_a_flow_that_came_back_is_not_forgotten() -> None:
    """The clock passes the old counter of a client that waits again: it stays in the books."""
    queue = make_queue()
    queue.join(ticket("far", 5000), 0.0)
    fill(queue, 1)
    once = ticket("a", 50)
    queue.begin(once, 0.0)
    queue.end(once, 0.0)
    back = ticket("a", 50)
    far = ticket("far", 10)
    join_all(queue, [back, far], 0.0)
    queue.begin(far, 0.0)
    assert Flow("a") in flows(queue, MODEL)
    assert queue.pick(MODEL, 0.0) is back


def test_the_books_are_closed_a_while_after_the_last_wait() -> None:
    """A model that is busy, but makes no request wait, costs no bookkeeping; what waited is charged again when it has to."""
    queue = make_queue()
    stays, waits = ticket("a"), ticket("b")
    queue.begin(stays, 0.0)
    queue.join(waits, 1.0)
    queue.leave(waits, 2.0)
    for now, is_open in ((2.0, True), (2.0 + CLOSING_SECONDS, True), (3.0 + CLOSING_SECONDS, False)):
        each = ticket("c")
        queue.begin(each, now)
        queue.end(each, now)
        assert (queue._models[MODEL].books is not None) is is_open
    assert waits.waited_seconds == 1.0
    queue.join(ticket("a"), 100.0)
    assert queue.order(MODEL)[0].flow.client == "a"
    queue.join(waits, 100.0)
    assert queue.order(MODEL)[0] is waits


class Chaos(RuleBasedStateMachine):
    """Requests that come, wait, begin, fail over, are canceled and killed in any order."""

    @initialize(slots=st.sampled_from([None, 1, 3, 8]), places=st.integers(0, 6))
    def begin(self, slots: int | None, places: int) -> None:
        self.queue = FairQueue(max_waiting=places)
        self.queue.serve({"lab": Pool((MODEL, "phi"), slots), "second": Pool((MODEL,), slots)})
        self.at_once = AtOnce()
        self.live: list[Ticket] = []
        self.now = 0.0

    @rule(client=st.sampled_from("abc"), band=st.sampled_from(Band), model=st.sampled_from([MODEL, "phi"]), cost=COSTS, estimate=COSTS)
    def come(self, client: str, band: Band, model: str, cost: int, estimate: int) -> None:
        each = ticket(client, cost, estimate=estimate, band=band, model=model, needs=cost % 3)
        self.at_once.take(client)
        self.live.append(each)
        if self.queue.may_begin(each, self.now):
            self.queue.begin(each, self.now, "lab")
        else:
            self.wait(each)

    def wait(self, each: Ticket) -> None:
        self.queue.join(each, self.now)
        dropped = self.queue.overflow(each.model)
        if dropped is not None:
            self.over(dropped)
        assert self.queue.overflow(each.model) is None

    def over(self, each: Ticket) -> None:
        self.live.remove(each)
        self.at_once.give_back(each.flow.client)
        self.queue.end(each, self.now)
        self.queue.end(each, self.now)

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 100))
    def end_or_cancel(self, number: int) -> None:
        self.over(self.live[number % len(self.live)])

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 100))
    def fail_over(self, number: int) -> None:
        each = self.live[number % len(self.live)]
        if each.is_running:
            self.queue.release(each)
            self.wait(each)

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 100))
    def fail_and_retry(self, number: int) -> None:
        each = self.live[number % len(self.live)]
        if each.is_running:
            self.queue.release(each)
            self.queue.begin(each, self.now, "second")

    @rule(unmet=st.sets(st.integers(0, 2)), pool=st.sampled_from(["lab", "second"]))
    def free(self, unmet: set[int], pool: str) -> None:
        found = self.queue.pick_for(pool, self.now, unmet=unmet)
        if found is not None:
            assert found.is_waiting
            assert found.request.needs not in unmet
            self.queue.begin(found, self.now, pool)

    @rule(seconds=st.sampled_from([0.1, 10.0, 130.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(slots=st.sampled_from([None, 0, 2]), has_phi=st.booleans())
    def change_servers(self, slots: int | None, has_phi: bool) -> None:
        self.queue.serve({"lab": Pool((MODEL, "phi") if has_phi else (MODEL,), slots), "second": Pool((MODEL,), slots)})

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "queue"):
            return
        queue = self.queue
        for name in (MODEL, "phi"):
            own = [each for each in self.live if each.model == name]
            waiting = {each for each in own if each.is_waiting}
            counts = queue.counts(name)
            assert (counts.running, counts.waiting) == (sum(each.is_running for each in own), len(waiting))
            assert counts.clients_waiting == len({each.flow.client for each in waiting})
            assert set(queue.order(name)) == waiting == set(queue.places(name, self.now))
            if not own:
                assert flows(queue, name) == set()
        assert queue.anybody_waits == bool(queue.lengths())
        assert self.at_once.total == len(self.live)
        assert set(self.at_once.clients) == {each.flow.client for each in self.live}

    def teardown(self) -> None:
        for each in list(getattr(self, "live", [])):
            self.over(each)
        if hasattr(self, "queue"):
            assert is_empty(self.queue)
            assert (self.at_once.total, list(self.at_once.clients)) == (0, [])


Chaos.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestChaos = Chaos.TestCase


def test_ten_thousand_cancels_kills_and_failovers_leave_nothing() -> None:
    """Every counter, place and slot is 0 in the end, whatever happened to the requests."""
    chance = random.Random(1)
    queue, at_once = make_queue(slots=4, max_waiting=64), AtOnce()
    live: list[Ticket] = []
    happened = dict.fromkeys(("cancelled", "failed over", "dropped"), 0)

    def over(each: Ticket) -> None:
        live.remove(each)
        at_once.give_back(each.flow.client)
        queue.end(each, now)

    now = 0.0
    while sum(happened.values()) < 10_000:
        now += chance.expovariate(10.0)
        each = ticket(f"client {chance.randrange(12)}", chance.randint(0, 900), estimate=300.0, band=chance.choice(list(Band)))
        at_once.take(each.flow.client)
        live.append(each)
        if queue.may_begin(each, now) and queue.counts(MODEL).running < 4:
            queue.begin(each, now, "lab")
        else:
            queue.join(each, now)
        dropped = queue.overflow(MODEL)
        if dropped is not None:
            happened["dropped"] += 1
            over(dropped)
        for victim in chance.sample(live, min(2, len(live))):
            if victim.is_running and chance.random() < 0.5:
                happened["failed over"] += 1
                queue.release(victim)
                queue.join(victim, now)
            elif chance.random() < 0.5:
                happened["cancelled"] += 1
                over(victim)
        fill(queue, 4, now)
        assert queue.counts(MODEL).running + queue.waiting(MODEL) == len(live) == at_once.total
    assert min(happened.values()) > 100
    for each in list(live):
        over(each)
    assert is_empty(queue)
    assert (at_once.total, list(at_once.clients)) == (0, [])


# What can be seen


@pytest.mark.parametrize(("seconds", "step"), [(0.0, 5), (5.0, 5), (5.1, 10), (59.0, 60), (61.0, 120), (1e9, 240), (float("nan"), 240)])
def test_times_are_told_in_steps(seconds: float, step: int) -> None:
    """An estimate is rounded up: it shall not promise too much."""
    assert in_steps(seconds) == step
    assert step in STEPS


def test_the_place_tells_how_long_it_takes_about() -> None:
    """Position times the usual seconds, divided by the slots; nothing while nothing is known."""
    queue = make_queue(slots=2)
    for _ in range(2):
        queue.begin(ticket("a"), 0.0)
    waiting = [ticket("b"), ticket("c"), ticket("c"), ticket("c")]
    join_all(queue, waiting)
    assert queue.places(MODEL, 0.0)[waiting[0]] == Place(position=1, waiting=4, about_seconds=None)
    queue.learn(MODEL, seconds=16.0, output_tokens=100.0)
    assert [queue.places(MODEL, 0.0)[each].about_seconds for each in waiting] == [10, 20, 30, 60]
    assert ticket("d") not in queue.places(MODEL, 0.0)
    assert queue.until_next_end(MODEL, Flow("a")) == 10
    assert queue.until_next_end(MODEL, Flow("b")) == 10
    queue.serve({"lab": Pool((MODEL,), None)})
    assert queue.places(MODEL, 0.0)[waiting[0]].about_seconds is None


def test_a_client_sees_its_own_requests() -> None:
    """In all models and both bands, those of one model in their order, with all the time that they waited; nobody else's."""
    queue = make_queue(slots=1)
    queue.serve({"lab": Pool((MODEL, "phi"), 1)})
    mine = [ticket("me"), ticket("me"), ticket("me", band=Band.BULK), ticket("me", model="phi")]
    join_all(queue, [ticket("you"), *mine[:2]], 1.0)
    join_all(queue, mine[2:], 2.0)
    assert {(wait.ticket, wait.place.position, wait.seconds) for wait in queue.waits_of("me", 5.0)} == {
        (mine[0], 2, 4.0),
        (mine[2], 3, 3.0),
        (mine[1], 4, 4.0),
        (mine[3], 1, 3.0),
    }
    assert [wait.place.position for wait in queue.waits_of("me", 5.0) if wait.ticket.model == MODEL] == [2, 3, 4]
    queue.begin(mine[0], 6.0, "lab")
    queue.release(mine[0])
    queue.join(mine[0], 10.0)
    assert next(wait.seconds for wait in queue.waits_of("me", 12.0) if wait.ticket is mine[0]) == 7.0
    assert queue.waits_of("a stranger", 12.0) == []


def test_a_client_alone_is_not_held_back() -> None:
    """The estimate counts shares of slots only while they hold."""
    queue = make_queue(slots=4)
    queue.learn(MODEL, seconds=20.0, output_tokens=100.0)
    bulk = [ticket("a", band=Band.BULK) for _ in range(4)]
    join_all(queue, bulk)
    assert queue.places(MODEL, 0.0)[bulk[3]].about_seconds == 20
    queue.begin(ticket("b"), 0.0)
    assert queue.places(MODEL, 0.0)[bulk[3]].about_seconds == 60
    assert queue.until_next_end(MODEL, Flow("c")) == 20


@given(st.lists(st.floats(1.0, 1000.0), min_size=1, max_size=40))
def test_means_are_learnt(values: list[float]) -> None:
    """The first 16 requests count equally, later ones replace older ones; a mean lies between what it was made of."""
    queue = make_queue()
    for value in values:
        queue.learn(MODEL, seconds=value, output_tokens=value)
    mean = queue.mean_output_tokens(MODEL)
    assert min(values) - 1e-6 <= mean <= max(values) + 1e-6
    if len(values) <= 16:
        assert mean == pytest.approx(sum(values) / len(values))
    queue.begin(ticket("a"), 0.0)
    assert queue.until_next_end(MODEL, Flow("a")) == in_steps(mean)


# At once


def test_a_limit_holds_for_waiting_only() -> None:
    """A client may use all free servers; with more requests than its limit, none of them may wait."""
    at_once = AtOnce()
    for _ in range(3):
        at_once.take("key")
    at_once.take("other")
    assert [at_once.may_wait("key", limit) for limit in (0, 1, 2, 3, 4)] == [True, False, False, True, True]
    assert (at_once.live("key"), at_once.live("nobody"), at_once.total) == (3, 0, 4)
    for client in ("key", "key", "key", "other"):
        at_once.give_back(client)
    assert (at_once.total, list(at_once.clients)) == (0, [])
    with pytest.raises(KeyError):
        at_once.give_back("key")
    assert at_once.total == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
def test_the_sum_is_what_is_live(steps: list[tuple[str, bool]]) -> None:
    """Counts by client add up to the total, whatever the order."""
    at_once = AtOnce()
    live: list[str] = []
    for client, comes in steps:
        if comes:
            at_once.take(client)
            live.append(client)
        elif client in live:
            at_once.give_back(client)
            live.remove(client)
        assert at_once.total == len(live) == sum(at_once.live(each) for each in at_once.clients)
        assert all(at_once.live(each) == live.count(each) for each in "abc")


@given(st.lists(st.floats(0.0, 1e6), max_size=5))
@settings(max_examples=20)
def test_jain_lies_between_one_nth_and_one(values: list[float]) -> None:
    """Equal shares give 1, everything for one gives 1/n."""
    assert 1 / max(1, len(values)) - 1e-9 <= jain(values) <= 1 + 1e-9
    assert jain([7.0] * 5) == pytest.approx(1.0)
    assert jain([0.0, 0.0, 9.0]) == pytest.approx(1 / 3)
    assert jain([]) == 1.0
