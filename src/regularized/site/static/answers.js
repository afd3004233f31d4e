// What htmx gets back: an answer that is an error, or lacks the part that was asked for, never takes the place of anything.
// It is said beside the form that asked, and what was typed stays; what worked is said to who cannot see it.
(() => {
  "use strict";
  const unreachable = "The site does not answer. Nothing was changed; try again.";

  const noteOf = (form) => form.querySelector("[data-problem]");
  const draftOf = (field) => `draft ${location.pathname}#${field.id}`;

  const say = (form, ...parts) => {
    const note = noteOf(form);
    if (note) note.replaceChildren(...parts);
  };

  document.addEventListener("htmx:after:request", (event) => {
    const { sourceElement: form, response, select, text } = event.detail.ctx;
    const page = new DOMParser().parseFromString(text, "text/html");
    if (response.status < 400 && (!select || page.querySelector(select))) {
      say(form);
      for (const field of form.querySelectorAll("[data-draft]")) sessionStorage.removeItem(draftOf(field));
      document.getElementById("done").textContent = form.dataset.done || "";
      return;
    }
    event.preventDefault();
    const said = page.getElementById("problem");
    say(form, ...(said ? said.childNodes : [text.length < 300 && text.trim() ? text : unreachable]));
  });

  document.addEventListener("htmx:error", (event) => {
    const form = event.detail.ctx?.sourceElement;
    if (form && !event.detail.ctx.response) say(form, unreachable);
  });

  // A session that has ended leads to the sign-in page and back: what was typed waits here.
  for (const field of document.querySelectorAll("[data-draft]")) {
    field.value ||= sessionStorage.getItem(draftOf(field)) || "";
  }
  document.addEventListener("input", (event) => {
    if (event.target.matches("[data-draft]")) sessionStorage.setItem(draftOf(event.target), event.target.value);
  });
})();
