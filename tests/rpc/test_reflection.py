"""Catalogs from what participants say of themselves: names resolved, hostile ones refused, stale ones read again."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from rpc.outcomes import Lost
from rpc.reflection import Catalog, catalog_from_descriptor_set
from saga.ports import Outcome
from tests.rpc.calling import calling, step
from tests.support.participants import Script, compiled, participant


def file(name: str, *imports: str) -> bytes:
    return FileDescriptorProto(name=name, dependency=imports, syntax="proto3").SerializeToString()


def only_package(package: str, content: bytes) -> bytes:
    files = FileDescriptorSet.FromString(content).file
    return FileDescriptorSet(file=[item for item in files if item.package == package]).SerializeToString()


def test_a_full_name_wins_over_a_short_one_that_many_have() -> None:
    catalog = catalog_from_descriptor_set(compiled("shop.proto", "shop_v2.proto"))
    assert catalog.method("shop.v2.Inventory.Reserve").full_name == "shop.v2.Inventory.Reserve"
    assert catalog.method("Payments.Charge").full_name == "shop.v1.Payments.Charge"
    with pytest.raises(Lost, match=r"ambiguous: shop\.v1\.Inventory, shop\.v2\.Inventory"):
        catalog.method("Inventory.Reserve")


@pytest.mark.parametrize("wanted", ["", ".", "Reserve", "Inventory.", ".Reserve", "shop.v1.Inventory", "a.b.c.d.e"])
def test_names_that_mean_nothing_are_told(wanted: str) -> None:
    catalog = catalog_from_descriptor_set(compiled("shop.proto"))
    with pytest.raises(Lost, match="offers"):
        catalog.method(wanted)


def test_a_service_without_a_description_is_told() -> None:
    with pytest.raises(Lost, match="does not describe"):
        Catalog({}, ["shop.v1.Inventory"]).method("Inventory.Reserve")


def test_files_that_import_each_other_in_a_circle_are_refused() -> None:
    with pytest.raises(ValueError, match="imports itself"):
        Catalog({"a": file("a", "b"), "b": file("b", "c"), "c": file("c", "a")}, [])


def test_a_long_chain_of_imports_is_followed() -> None:
    names = [f"f{number}.proto" for number in range(3000)]
    chain = {name: file(name, *names[number + 1 : number + 2]) for number, name in enumerate(names)}
    assert Catalog(chain, []).services == {}


def test_a_set_whose_imports_are_missing_is_refused() -> None:
    described = only_package("shop.v2", compiled("shop_v2.proto"))
    with pytest.raises(ValueError, match="include_imports"):
        catalog_from_descriptor_set(described)


def test_well_known_files_may_be_missing_from_a_set() -> None:
    described = only_package("shop.v1", compiled("shop.proto"))
    assert catalog_from_descriptor_set(described).method("Inventory.Reserve")


async def test_a_method_the_participant_calls_unimplemented_is_looked_up_again() -> None:
    script: Script = {"Reserve": [{"status": "UNIMPLEMENTED", "times": 1}, {"answer": {}}]}
    with participant("grpclib", script=script) as shop:
        async with calling(shop) as caller:
            refused = await caller.call(step())
            assert (refused.outcome, refused.code) == (Outcome.REFUSED, "UNIMPLEMENTED")
            assert (await caller.call(step())).outcome is Outcome.DONE
