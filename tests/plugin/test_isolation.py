"""Scope `request`: what could hand one request's keys and values to another is off or refused."""

from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs

import vllm_capmoe
from vllm_capmoe import CapacityConfig
from vllm_capmoe.integration import checks, isolation

vllm_capmoe.register()

REQUEST = {"mode": "drop", "scope": "request"}


def engine_config(model: Any, capacity: dict[str, str], **settings: Any) -> Any:
    additional = {"moe_capacity": capacity}
    made = EngineArgs(model=str(model), max_model_len=128, additional_config=additional, **settings)
    return made.create_engine_config()


@pytest.fixture(scope="module")
def finished(example_model) -> Any:
    """A configuration that is accepted, on which the tests set more."""
    return engine_config(example_model, REQUEST)


def check(finished: Any, transfer: dict[str, Any], scope: str = "request") -> None:
    config = CapacityConfig(**(REQUEST | {"scope": scope}))
    with pytest.MonkeyPatch.context() as patch:
        role = {"kv_role": "kv_both"}
        patch.setattr(finished, "kv_transfer_config", KVTransferConfig(**role | transfer))
        checks.check_engine(config, finished)


def test_prefix_caching_is_turned_off(example_model, finished, monkeypatch):
    assert not finished.cache_config.enable_prefix_caching
    message = "--enable-prefix-caching hands what one request computed"
    with pytest.raises(ValueError, match=message):
        engine_config(example_model, REQUEST, enable_prefix_caching=True)
    batch = engine_config(example_model, {"mode": "drop"})
    assert batch.cache_config.enable_prefix_caching
    with pytest.raises(ValueError, match=message):  # a worker of an engine that was made otherwise
        checks.check_engine(CapacityConfig(**REQUEST), batch)


def test_every_connector_of_vllm_is_known_or_refused(finished):
    accepted = {*isolation.HAND_ON, *isolation.LOAD_NOTHING, "MultiConnector"}
    assert accepted <= set(KVConnectorFactory._registry)
    for name in KVConnectorFactory._registry:
        transfer = {"kv_connector": name}
        check(finished, transfer, scope="batch")
        if name in accepted:
            check(finished, transfer)
        else:
            with pytest.raises(ValueError, match=f"scope is 'request', but .* has {name}, which"):
                check(finished, transfer)


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_one_side_of_a_shared_store_is_refused_too(finished, role):
    with pytest.raises(ValueError, match="has LMCacheConnectorV1, which"):
        check(finished, {"kv_connector": "LMCacheConnectorV1", "kv_role": role})
    check(finished, {"kv_connector": "NixlConnector", "kv_role": role})


def test_connectors_in_a_connector(finished):
    nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    store = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}

    def multi(*children: dict[str, Any]) -> dict[str, Any]:
        extra = {"connectors": list(children)}
        return {"kv_connector": "MultiConnector", "kv_connector_extra_config": extra}

    check(finished, multi(nixl, nixl))
    with pytest.raises(ValueError, match="has OffloadingConnector, which"):
        check(finished, multi(nixl, {**multi(store), "kv_role": "kv_both"}))


def test_a_connector_of_ones_own_is_refused_whatever_its_name(finished):
    transfer = {"kv_connector": "NixlConnector", "kv_connector_module_path": "my.connectors"}
    with pytest.raises(ValueError, match="has my.connectors.NixlConnector, which"):
        check(finished, transfer)


def test_offloading_is_refused(example_model):
    engine_config(example_model, {"mode": "drop"}, kv_offloading_size=1.0)
    with pytest.raises(ValueError, match="'request', but --kv-offloading-size 1.0 hands what one"):
        engine_config(example_model, REQUEST, kv_offloading_size=1.0)
    shared = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with pytest.raises(ValueError, match="has ExampleConnector, which"):
        engine_config(example_model, REQUEST, kv_transfer_config=KVTransferConfig(**shared))
