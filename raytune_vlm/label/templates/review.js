// Puts chosen fields into the labels and saves what was reviewed as a file. It reads the page's own
// attributes and text areas as text or JSON and writes only text: nothing becomes markup or code.
"use strict";
const entries = Array.from(document.querySelectorAll(".entry"));
const bar = document.querySelector(".savebar");
const saved = { all: true };

const area = (entry) => entry.querySelector("textarea");
const verdict = (entry) => entry.querySelector("input:checked").value;

const read = (entry) => {
  const text = area(entry).value;
  if (entry.dataset.text === "1") return text.trim() === "" ? undefined : text.trim();
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
};

const put = (whole, path, value) => {
  if (path.length === 0) return value;
  const [step, ...rest] = path;
  const makes = typeof step === "number" ? Array.isArray(whole) : whole !== null && typeof whole === "object";
  const node = makes ? whole : typeof step === "number" ? [] : {};
  if (rest.length > 0) {
    node[step] = put(Object.hasOwn(node, step) ? node[step] : null, rest, value);
  } else if (value !== undefined) {
    Object.defineProperty(node, step, { value, writable: true, enumerable: true, configurable: true });
  } else if (Array.isArray(node)) {
    node.splice(step, 1);
  } else if (Object.hasOwn(node, step)) {
    node[step] = null;
  }
  return node;
};

const show = () => {
  let done = 0, broken = 0;
  for (const entry of entries) {
    const wrong = verdict(entry) === "use" && read(entry) === undefined;
    entry.querySelector(".wrong").hidden = !wrong;
    entry.classList.toggle("done", verdict(entry) !== "" && !wrong);
    done += verdict(entry) !== "" && !wrong ? 1 : 0;
    broken += wrong ? 1 : 0;
  }
  document.getElementById("count").textContent =
    `${done} of ${entries.length} reviewed` + (broken ? `, ${broken} cannot be read yet` : "");
  document.getElementById("save").disabled = done === 0;
};

const touch = (entry) => {
  entry.querySelector("input[value=use]").checked = true;
  saved.all = false;
  show();
};

for (const entry of entries) {
  area(entry).addEventListener("input", () => touch(entry));
  entry.addEventListener("change", () => { saved.all = false; show(); });
  for (const button of entry.querySelectorAll("button.take")) {
    button.addEventListener("click", () => {
      const value = button.dataset.value === "" ? undefined : JSON.parse(button.dataset.value);
      if (entry.dataset.text === "1") {
        area(entry).value = value ?? "";
      } else {
        const whole = put(read(entry) ?? null, JSON.parse(button.dataset.path), value);
        area(entry).value = JSON.stringify(whole, null, 2);
      }
      touch(entry);
    });
  }
}

if (bar !== null) {
  document.getElementById("save").addEventListener("click", () => {
    const rows = [];
    for (const entry of entries) {
      const place = { page: entry.dataset.page, task: entry.dataset.task };
      const value = read(entry);
      if (verdict(entry) === "discard") rows.push({ ...place, discard: true });
      else if (verdict(entry) === "use" && value !== undefined) rows.push({ ...place, value });
    }
    const text = rows.map((row) => JSON.stringify(row) + "\n").join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
    link.download = "reviewed.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    saved.all = true;
  });
  addEventListener("beforeunload", (event) => { if (!saved.all) event.preventDefault(); });
  bar.hidden = false;
  show();
}
