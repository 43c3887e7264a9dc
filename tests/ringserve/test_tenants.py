"""Tenants: shares by weight, bounded delay beside a greedy one, nothing saved up and nothing held against anyone."""

import random

import pytest

from ringserve.config import PolicyName
from ringserve.errors import ConfigError
from ringserve.policy import POLICIES
from ringserve.scheduling_params import SchedulingParams
from ringserve.tenants import Tenants
from tests.ringserve.fake_ranks import VOCABULARY, Driven

ALL: list[PolicyName] = sorted(POLICIES)


# The table

def test_with_one_tenant_there_is_nothing_to_share() -> None:
    tenants = Tenants()
    tenants.join("a", ["a"])
    tenants.charge("a", 5.0)
    assert not tenants.several and tenants.served("a") == 0.0 and tenants.served("never seen") == 0.0


def test_a_newcomer_begins_with_those_who_have_had_the_least() -> None:
    tenants = Tenants()
    for name in "ab":
        tenants.join(name, "ab")
    tenants.charge("a", 5.0)
    tenants.charge("b", 7.0)
    tenants.join("c", "abc")
    assert tenants.several and [tenants.served(name) for name in "abc"] == [5.0, 7.0, 5.0]


def test_seconds_count_by_weight() -> None:
    tenants = Tenants(("a=2", "b=0.5"))
    for name in "abc":
        tenants.join(name, "abc")
    for name in "abc":
        tenants.charge(name, 3.0)
    assert [tenants.served(name) for name in "abc"] == [1.5, 6.0, 3.0]
    tenants.charge("a", -1.0)
    assert tenants.served("a") == 1.5, "time never runs backwards"


def test_one_that_was_idle_saves_nothing_up() -> None:
    tenants = Tenants()
    tenants.join("a", "a")
    tenants.join("b", "ab")
    tenants.charge("a", 100.0)
    tenants.join("b", "ab"[:1])  # b had gone, and comes back
    assert tenants.served("b") == tenants.served("a")


def test_one_that_has_work_keeps_its_turn_when_it_asks_for_more() -> None:
    """Else who asks often is always put behind those who ask once."""
    tenants = Tenants()
    for name in "ab":
        tenants.join(name, "ab")
    tenants.charge("a", 2.0)
    tenants.join("b", "ab")
    assert (tenants.served("a"), tenants.served("b")) == (2.0, 0.0)


def test_what_was_had_while_nobody_else_asked_is_not_held_against_anyone() -> None:
    tenants = Tenants()
    tenants.join("a", "a")
    tenants.charge("a", 3600.0)
    tenants.join("b", "b")  # a has gone home
    tenants.charge("b", 1.0)
    tenants.join("a", "ab")
    assert abs(tenants.served("a") - tenants.served("b")) <= 1.0


def test_one_that_was_ahead_does_not_come_back_as_if_it_had_had_nothing() -> None:
    tenants = Tenants()
    for name in "ab":
        tenants.join(name, "ab")
    tenants.charge("a", 10.0)
    tenants.charge("b", 2.0)
    tenants.join("a", "ab"[1:])  # it went and came again at once
    assert tenants.served("a") == 10.0


@pytest.mark.parametrize("together", [1, 2, 5])
def test_names_do_not_grow_the_table_for_ever(together: int) -> None:
    """Thousands of tenants, a few at a time."""
    tenants, source = Tenants(), random.Random(together)
    active: list[str] = []
    for number in range(5000):
        active = active[-(together - 1):] if together > 1 else []
        active.append(f"tenant {number}")
        tenants.join(active[-1], active)
        for name in active:
            tenants.charge(name, source.uniform(0.1, 1.0))
    assert len(tenants._served) <= 100


@pytest.mark.parametrize("text", ["", "a", "=2", "a=", "a=0", "a=-1", "a=x", "a=nan", "a=inf", "a=1e6", "a 2", "="])
def test_weights_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a tenant's weight is written name=2"):
        Tenants((text,))
    with pytest.raises(ConfigError):
        Driven(weights=(text,))


def test_a_name_may_hold_an_equals_sign() -> None:
    tenants = Tenants(("a=b=2", " =4"))
    names = ["a=b", " ", "a"]
    for name in names:
        tenants.join(name, names)
    for name in names:
        tenants.charge(name, 4.0)
    assert [tenants.served(name) for name in names] == [2.0, 1.0, 4.0]


# In the scheduler

def prompt(length: int, seed: int = 1) -> list[int]:
    return [(i * 7 + seed) % VOCABULARY for i in range(length)]


def of(tenant: str) -> SchedulingParams:
    return SchedulingParams(tenant=tenant)


def drive(policy: PolicyName, **options: object) -> Driven:
    return Driven(**{"ring": 2, "slots": 4000, "block": 4, "chunk": 64, "running": 60, "policy": policy,  # type: ignore[arg-type]
                     "max_step_ms": 5.0, **options})


def first_token_at(driven: Driven, name: str, most: int = 4000) -> float:
    for _ in range(most):
        if driven.output[name]:
            return driven.now
        driven.step()
    raise AssertionError("starved")


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("length", [20, 200, 800])
def test_ten_long_prompts_of_one_tenant_delay_another_by_a_bounded_amount(policy: PolicyName, length: int) -> None:
    alone = drive(policy)
    alone.add("ours", prompt(length), max_tokens=1, scheduling=of("we"))
    own_s = first_token_at(alone, "ours")

    beside = drive(policy)
    for i in range(10):
        beside.add(f"theirs{i}", prompt(1000, seed=i), max_tokens=1, scheduling=of("they"))
    for _ in range(7):
        beside.step()
    came = beside.now
    beside.add("ours", prompt(length), max_tokens=1, scheduling=of("we"))
    assert first_token_at(beside, "ours") - came <= 2.2 * own_s + 2 * 0.005


def worked(driven: Driven, steps: int, done: dict[str, float] | None = None) -> dict[str, float]:
    """Seconds of the machine by tenant: by how much its rows made each step longer than the ones before them did."""
    done = {} if done is None else done
    charge = driven.scheduler.tenants.charge

    def charged(tenant: str, seconds: float) -> None:
        done[tenant] = done.get(tenant, 0.0) + seconds
        charge(tenant, seconds)

    driven.scheduler.tenants.charge = charged  # type: ignore[method-assign]
    for _ in range(steps):
        driven.step()
    driven.scheduler.tenants.charge = charge  # type: ignore[method-assign]
    return done


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("weights, share", [((), 1.0), (("a=2",), 2.0), (("a=3", "b=2"), 1.5)])
def test_shares_are_as_the_weights(policy: PolicyName, weights: tuple[str, ...], share: float) -> None:
    """However many requests each has, and whoever was first."""
    driven = drive(policy, weights=weights)
    for i in range(9):
        driven.add(f"b{i}", prompt(1500, seed=i), scheduling=of("b"))
        if i % 3 == 0:
            driven.add(f"a{i}", prompt(1500, seed=i), scheduling=of("a"))
    done = worked(driven, 90)
    assert any(r.done < r.prompt_tokens for r in driven.requests.values() if r.scheduling.tenant == "a")
    assert done["a"] / done["b"] == pytest.approx(share, rel=0.25)


@pytest.mark.parametrize("policy", ALL)
def test_an_idle_tenant_saves_nothing_up_for_later(policy: PolicyName) -> None:
    driven = drive(policy)
    for i in range(6):
        driven.add(f"a{i}", prompt(1000, seed=i), scheduling=of("a"))
    driven.add("b", prompt(30), max_tokens=1, scheduling=of("b"))
    worked(driven, 60)
    assert "b" in driven.ended
    for i in range(6):
        driven.add(f"b{i}", prompt(1000, seed=10 + i), scheduling=of("b"))
    done = worked(driven, 60)
    assert done["a"] / done["b"] == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize("policy", ALL)
def test_one_that_used_an_idle_machine_is_not_punished_for_it(policy: PolicyName) -> None:
    driven = drive(policy)
    for i in range(3):
        driven.add(f"early{i}", prompt(1500, seed=i), max_tokens=1, scheduling=of("a"))
    while driven.scheduler.has_work:
        driven.step()
    for i in range(6):
        driven.add(f"b{i}", prompt(1000, seed=20 + i), scheduling=of("b"))
        driven.add(f"a{i}", prompt(1000, seed=30 + i), scheduling=of("a"))
    done = worked(driven, 60)
    assert done.get("a", 0.0) / done["b"] == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize("policy", ["edf", "slack", "srpt", "slack-floor"])
def test_one_that_asks_in_every_step_keeps_its_share(policy: PolicyName) -> None:
    """Its prompts too long to ride along; the other's were there first and are as urgent."""
    driven = drive(policy, ride_along=False, running=400, slots=30_000)
    for i in range(3):
        driven.add(f"a{i}", prompt(1500, seed=i), scheduling=SchedulingParams(tenant="a", priority=-8))
    done: dict[str, float] = {}
    for i in range(80):
        driven.add(f"b{i}", prompt(300, seed=i), max_tokens=1, scheduling=SchedulingParams(tenant="b", priority=8))
        worked(driven, 1, done)
    assert done["a"] / done.get("b", 1e-9) == pytest.approx(1.0, rel=0.3)


def test_many_tenants_come_and_go() -> None:
    driven = drive("srpt", slots=100)
    for number in range(1500):
        driven.add(f"r{number}", [number % VOCABULARY, 1, 2], max_tokens=1, scheduling=of(f"tenant {number}"))
        if number % 3:
            driven.step()
    driven.finish()
    assert len(driven.scheduler.tenants._served) <= 100
