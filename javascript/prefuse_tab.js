// The page "Prefuse": tooltips, keys, copying. Loaded by the WebUI as a file, and by the page itself elsewhere.

(function() {
    function root() {
        return document.getElementById("prefuse");
    }

    function showHints() {
        const data = document.getElementById("prefuse-hints");
        if (!data || data.dataset.done) return;
        const hints = JSON.parse(data.dataset.hints);
        const missing = Object.keys(hints).filter((id) => !document.getElementById(id));
        for (const [id, hint] of Object.entries(hints)) {
            const element = document.getElementById(id);
            if (element) element.title = hint;
        }
        if (!missing.length) data.dataset.done = "1";
    }

    function onKey(event) {
        if (!(event.key === "Enter" && (event.ctrlKey || event.metaKey))) return;
        const tab = root() && root().contains(event.target) && event.target.closest("[role=tabpanel], .tabitem");
        const button = tab && tab.querySelector(".prefuse-start");
        if (!button) return;
        event.preventDefault();
        (button.tagName === "BUTTON" ? button : button.querySelector("button") || button).click();
    }

    function copy(text) {
        if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
        const box = document.createElement("textarea"); // over plain http browsers have no clipboard for scripts
        box.value = text;
        document.body.append(box);
        box.select();
        document.execCommand("copy");
        box.remove();
    }

    function onClick(event) {
        const button = event.target.closest && event.target.closest(".prefuse-copy");
        if (!button) return;
        event.preventDefault();
        copy(button.dataset.text);
        button.classList.add("prefuse-copied");
        setTimeout(() => button.classList.remove("prefuse-copied"), 1500);
    }

    if (window.prefuseTab) return; // the page was loaded anew
    window.prefuseTab = true;
    document.addEventListener("keydown", onKey, true);
    document.addEventListener("click", onClick);
    setInterval(showHints, 500);
})();
