// What pages can do more with JavaScript: buttons that copy. Everything else works without.
(() => {
  "use strict";
  const prepare = (root) => {
    for (const button of root.querySelectorAll("button.copy[hidden]")) {
      button.hidden = !navigator.clipboard;
    }
  };
  prepare(document);
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.innerText.trim() + "\n");
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select and copy";
      getSelection().selectAllChildren(source);
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
})();
