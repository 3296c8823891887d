"""Who is in charge: order of callbacks, reloads of the page, the setting that gives the tags back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TimedOutError

import pytest
import torch
from torch import nn

from lib_lora.errors import RequestError
from tests.webui import stand_in

OFF = {"prefuse_enabled": False}


def is_ours(network):
    return type(network).__name__ == "PrefuseNetwork"


def test_we_stand_before_the_built_in_extension_for_both_names(webui):
    extra_networks = webui.modules.extra_networks
    assert is_ours(webui.registered)
    assert extra_networks.extra_network_aliases["lyco"] is webui.registered
    assert list(extra_networks.extra_network_registry) == ["lora"]


def test_the_callbacks_in_any_order_leave_one_registration(webui):
    callbacks = webui.modules.script_callbacks
    for _ in range(3):
        callbacks.run("app_started", None, webui.app)
        callbacks.run("model_loaded", webui.model)
    assert is_ours(webui.registered)
    assert len(webui.app.routes) == 5


def test_a_job_of_the_page_that_goes_on_waits_for_the_extension_that_is_loaded_anew(webui):
    from lib_lora.hosts.webui.callbacks import NEWEST

    before = NEWEST.loras()
    with ThreadPoolExecutor() as pool:
        webui.modules.script_callbacks.run("script_unloaded")
        job = pool.submit(NEWEST.loras)
        with pytest.raises(TimedOutError):
            job.result(0.1)
        webui.load()
        assert job.result(10) is not before
    assert job.result().sessions.catalog.find("ink").path.is_file()


def test_a_job_of_the_page_is_refused_if_the_extension_does_not_come_again(webui, monkeypatch):
    from lib_lora.hosts.webui import callbacks

    monkeypatch.setattr(callbacks, "RELOAD_SECONDS", 0.1)
    webui.modules.script_callbacks.run("script_unloaded")
    with pytest.raises(RequestError, match="unloaded the extension"):
        callbacks.NEWEST.loras()


def test_ten_reloads_are_one_registration_and_change_no_picture(webui, expected):
    base = webui.state()
    for _ in range(10):
        assert torch.equal(webui.picture("a cat <lora:ink:0.8>"), expected([("ink", 0.8)], "a cat "))
        before = webui.registered
        webui.reload()
        assert webui.state() == base
        assert is_ours(webui.registered)
        assert webui.registered is not before
    patched = webui.modules.patches.originals["prefuse"]
    assert sorted(method for _, method in patched) == ["cached_params", "get_alias"]
    labels = [axis.label for axis in webui.modules.scripts.scripts_data[0].module.axis_options]
    assert len(labels) == len(set(labels))
    assert not webui.modules.errors.shown


def test_a_reload_while_loras_are_fused_gives_the_base_back(webui):
    base = webui.state()
    webui.picture("a cat <lora:ink:0.8>")
    webui.modules.script_callbacks.run("script_unloaded")
    assert webui.state() == base
    assert webui.networks.loaded_networks == []


def test_switched_off_and_reloaded_the_built_in_extension_is_alone(webui):
    webui.picture("a cat <lora:ink:0.8>")
    callbacks = webui.modules.script_callbacks
    callbacks.run("script_unloaded")
    callbacks.clear_callbacks()
    webui.modules.extra_networks.initialize()
    import lora_script

    lora_script.load()
    callbacks.run("before_ui")
    assert webui.registered is webui.networks.extra_network_lora
    assert not webui.modules.patches.originals["prefuse"]
    assert nn.Linear.forward is webui.networks.network_Linear_forward
    assert not webui.modules.errors.shown


def test_the_built_ins_forwards_are_out_while_we_are_in_charge(webui):
    original = webui.modules.patches.original("lora_patches", nn.Linear, "forward")
    webui.picture("a cat <lora:ink:0.8>")
    assert nn.Linear.forward is original
    webui.reload()
    assert nn.Linear.forward is webui.networks.network_Linear_forward
    webui.picture("a cat")
    assert nn.Linear.forward is original


def test_what_others_put_on_top_of_the_built_ins_forward_stays_and_changes_nothing(webui, expected):
    beneath = nn.Linear.forward

    def on_top(self, *args):
        return beneath(self, *args)

    nn.Linear.forward = on_top
    assert torch.equal(webui.picture("a cat <lora:ink:0.8>"), expected([("ink", 0.8)], "a cat "))
    assert nn.Linear.forward is on_top
    assert torch.equal(webui.picture("a cat"), expected([], "a cat"))
    nn.Linear.forward = beneath


def test_a_forward_of_the_built_in_that_others_took_from_a_module_changes_nothing(webui, expected):
    for module in webui.model.modules():
        if isinstance(module, nn.Linear):
            module.forward = module.forward
    assert torch.equal(webui.picture("a cat <lora:ink:0.8>"), expected([("ink", 0.8)], "a cat "))
    assert torch.equal(webui.picture("a cat"), expected([], "a cat"))
    webui.set(prefuse_enabled=False)
    assert not torch.equal(webui.picture("a cat <lora:ink:0.8>"), expected([], "a cat"))


def test_the_setting_gives_the_tags_to_the_built_in_extension_and_back(webui, expected):
    ours, plain = webui.picture("a cat <lora:ink:0.8>"), webui.picture("a cat")
    webui.set(prefuse_enabled=False)
    theirs = webui.picture("a cat <lora:ink:0.8>")
    assert webui.networks.extra_network_lora.calls[-1] == [["ink", "0.8"]]
    assert not torch.equal(theirs, ours)
    assert torch.equal(webui.picture("a cat"), plain)
    webui.picture("a cat <lora:ink:0.8>")
    webui.set(prefuse_enabled=True)
    assert torch.equal(webui.picture("a cat"), plain)  # what the built-in had merged is gone
    assert torch.equal(webui.picture("a cat <lora:ink:0.8>"), ours)


def test_one_generation_can_be_given_to_the_built_in_extension(webui, expected):
    ours = webui.picture("a cat <lora:ink:0.8>")
    assert not torch.equal(webui.picture("a cat <lora:ink:0.8>", override_settings=OFF), ours)
    assert torch.equal(webui.picture("a cat <lora:ink:0.8>"), ours)
    assert torch.equal(webui.picture("a cat", override_settings=OFF), expected([], "a cat"))


def test_others_read_what_is_applied(webui):
    webui.picture("a cat <lora:ink:0.8:0.3><lora:nosuch:1><lora:echo:1:dyn=2>")
    listed = [
        (one.name, one.mentioned_name, one.te_multiplier, one.unet_multiplier, one.dyn_dim, one.network_on_disk.name)
        for one in webui.networks.loaded_networks
    ]
    assert listed == [("ink", "ink", 0.8, 0.3, None, "ink"), ("echo", "echo", 1.0, 1.0, 2, "alias")]
    webui.picture("a cat")
    assert webui.networks.loaded_networks == []


def test_strengths_that_another_extension_writes_while_it_draws_change_nothing_and_are_told(webui, monkeypatch):
    drawn = webui.picture("a cat <lora:ink:0.8><lora:wash:0.5>")
    denoise = webui.modules.processing.denoise

    def schedule(p, c, uc):
        webui.networks.loaded_networks[0].unet_multiplier = 0.1
        return denoise(p, c, uc)

    monkeypatch.setattr(webui.modules.processing, "denoise", schedule)
    done = webui.generate("a cat <lora:ink:0.8><lora:wash:0.5>")
    assert torch.equal(done.images[0], drawn)
    assert "another extension changed the strengths of ink while" in done.comments
    monkeypatch.undo()
    assert webui.generate("a cat <lora:ink:0.8><lora:wash:0.5>").comments == ""


def test_a_model_that_is_loaded_first_meets_no_lora(webui):
    assert webui.modules.sd_models.model_data.sd_model is None
    base = stand_in.digest(*webui.templates["first"].parts().values())
    assert webui.state() == base


def test_it_works_without_the_built_in_extension(fake_modules, templates, lora_dir, tmp_path, expected):
    webui = stand_in.WebUI(templates, lora_dir, tmp_path, with_builtin=False)
    done = webui.generate("a cat <lora:ink:0.8>")
    assert torch.equal(done.images[0], expected([("ink", 0.8)], "a cat "))
    assert "ink: " in done.extra_generation_params["Lora hashes"]
    webui.set(prefuse_enabled=False)
    assert torch.equal(webui.picture("a cat <lora:ink:0.8>"), expected([], "a cat "))


def test_a_hash_that_means_no_file_or_two_is_not_looked_up(webui):
    webui.picture("a cat")
    lookup = webui.networks.available_network_hash_lookup
    ink, wash = (webui.networks.available_networks[name] for name in ("ink", "wash"))
    lookup["e3b0c44298fc"] = ink
    lookup["0123456789ab"] = ink
    lookup["ab"] = ink
    lookup["ab"] = ink
    lookup["0123456789ab"] = wash
    assert dict(lookup) == {"ab": ink}
    lookup["0123456789ab"] = ink
    assert "0123456789ab" not in lookup
    lookup.clear()
    lookup["0123456789ab"] = ink
    assert lookup["0123456789ab"] is ink


def test_a_fault_at_the_start_stops_no_other_callback(fake_modules, templates, lora_dir, tmp_path, monkeypatch, caplog):
    import modules.extra_networks

    monkeypatch.setattr(modules.extra_networks, "register_extra_network_alias", lambda *_: 1 / 0, raising=True)
    with pytest.raises(ZeroDivisionError):
        modules.extra_networks.register_extra_network_alias(None, "lyco")
    webui = stand_in.WebUI(templates, lora_dir, tmp_path, with_builtin=False)
    assert any("taking over" in record.getMessage() for record in caplog.records)
    assert not webui.modules.errors.shown
