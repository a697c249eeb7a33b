// What the pages can do without and are nicer with: parts that keep themselves up to date, files dropped, an upload
// that shows how far it is. Everything is rendered by the server; here its parts are only exchanged.
"use strict";

const GENTLY = 700; // milliseconds between two looks, however often something happens
const AGAIN = 2000; // after a look that found no service
const PATIENCE = 15000; // with one look; a network that is gone says nothing
const RARELY = 15; // seconds between looks where events tell what happens: a stream that is dead tells nothing

// Parts marked data-live are fetched again: after every event of data-events, else every data-every seconds. When what
// they tell of has ended, they come without those marks. After two looks in vain the page says so, until one succeeds.

let looking = null;
let missed = 0;
let seen = new Date();

async function look() {
  const signal = AbortSignal.timeout(PATIENCE);
  const answer = await fetch(location.href, { headers: { Accept: "text/html" }, signal });
  if (answer.status === 404 || answer.redirected) {
    location.reload(); // deleted, or signed out: the server says what there is instead
    return;
  }
  if (answer.status >= 500) throw new Error(`answers with status ${answer.status}`);
  if (!answer.ok) return; // later
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  document.title = fresh.title;
  for (const part of document.querySelectorAll("[data-live]")) exchange(part, fresh.getElementById(part.id));
  seen = new Date();
}

function found() {
  if (missed > 1) tell("The service answers again.", "");
  missed = 0;
}

function missedOne(error) {
  missed += 1;
  const what = error.message.startsWith("answers") ? error.message : "does not answer"; // a browser's own words vary
  const words = `The service ${what}; what is shown is of ${seen.toISOString().slice(11, 16)} UTC. Trying again.`;
  if (missed === 2) tell(words, words);
}

function tell(said, shown) {
  const line = document.getElementById("away");
  line.hidden = !shown;
  line.textContent = shown;
  document.getElementById("said").textContent = said;
}

function exchange(part, fresh) {
  if (fresh === null || part.outerHTML === fresh.outerHTML) return;
  const focused = part.contains(document.activeElement) ? document.activeElement : null;
  const ticked = [...part.querySelectorAll("input:checked")].map((box) => box.id);
  const scrolled = [...part.querySelectorAll(".scroll")].map((region) => [region.scrollLeft, region.scrollTop]);
  part.replaceWith(fresh);
  for (const id of ticked) if (document.getElementById(id)) document.getElementById(id).checked = true;
  fresh.querySelectorAll(".scroll").forEach((region, index) => region.scrollTo(...(scrolled[index] ?? [0, 0])));
  if (focused) (document.getElementById(focused.id) ?? fresh).focus({ preventScroll: true });
  if (fresh.dataset.says && part.dataset.says !== fresh.dataset.says) document.getElementById("said").textContent = fresh.dataset.says;
}

function lookSoon(after = GENTLY) {
  looking ??= setTimeout(async () => {
    let failed = null;
    if (!document.hidden) await look().then(found, (error) => (failed = error));
    looking = null;
    if (failed === null || document.querySelector("[data-live]") === null) return; // or it has ended
    missedOne(failed);
    lookSoon(AGAIN);
  }, after);
}

function keepLooking(seconds) {
  const part = document.querySelector("[data-every]");
  if (part === null) return; // it has ended
  setTimeout(() => {
    lookSoon(0);
    keepLooking(seconds);
  }, 1000 * (seconds ?? part.dataset.every));
}

function follow() {
  const part = document.querySelector("[data-every]");
  if (part === null) return;
  document.addEventListener("visibilitychange", () => document.hidden || lookSoon(0));
  if (!part.dataset.events) {
    keepLooking();
    return;
  }
  keepLooking(RARELY);
  const source = new EventSource(part.dataset.events);
  for (const kind of ["state", "stage", "block", "progress"]) source.addEventListener(kind, () => lookSoon());
  source.addEventListener("deleted", () => location.assign("/"));
  source.addEventListener("error", () => {
    lookSoon();
    if (source.readyState === EventSource.CLOSED && document.querySelector("[data-events]")) keepLooking();
  });
}

// The form: files dropped on a field or anywhere on it, and the upload's progress.

const KINDS = [
  ["evaluation", /(eval|test|valid).*\.(npz|npy|safetensors|zip|tar|tgz|tar\.gz)$/i],
  ["model", /\.(onnx|pth|pt)$/i],
  ["calibration", /\.(npz|npy|zip|tar|tgz|tar\.gz)$/i],
  ["model", /\.safetensors$/i],
];

function put(input, file) {
  const chosen = new DataTransfer();
  chosen.items.add(file);
  input.files = chosen.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}

function drop(form, event) {
  event.preventDefault();
  const field = event.target.closest("[data-drop]");
  const files = [...event.dataTransfer.files];
  const put_in = new Map();
  const left_out = [];
  for (const file of files) {
    const kind = KINDS.find(([, pattern]) => pattern.test(file.name));
    const name = field && files.length === 1 ? field.dataset.drop : kind && kind[0];
    if (form.elements[name]?.type !== "file") continue; // of an earlier job, or of no kind that is known
    if (put_in.has(name)) {
      left_out.push(`${file.name} is left out: ${put_in.get(name)} is kept as ${name}`);
      continue;
    }
    put(form.elements[name], file);
    put_in.set(name, file.name);
  }
  const taken = [...put_in].map(([name, called]) => `${called} as ${name}`).join(", ");
  document.getElementById("said").textContent = [taken, ...left_out].filter(Boolean).join(". ") || "No file that is known here.";
  form.querySelector("#sending").textContent = left_out.join(". "); // what went in, the fields show
}

function over(form, event) {
  if (event.type === "dragover") event.preventDefault();
  for (const part of form.querySelectorAll(".over")) part.classList.remove("over");
  form.classList.remove("over");
  if (event.type === "dragover") (event.target.closest?.("[data-drop]") ?? form).classList.add("over");
}

const LOST =
  "The connection was lost, and whether the job was taken in is not known. Send the form again: as long as nothing in it " +
  "is changed, it makes one job, however often it is sent.";

function send(form, event) {
  event.preventDefault();
  const [buttons, bar, words] = [form.querySelectorAll("button"), form.querySelector("#sent"), form.querySelector("#sending")];
  const said = new FormData(form); // before the buttons are disabled
  const button = event.submitter; // added by hand: FormData(form, button) is not known to every browser
  if (button?.name) said.set(button.name, button.value);
  const refused = document.getElementById("refused");
  const request = new XMLHttpRequest(); // fetch() does not tell how much of a body is sent
  const end = (text) => {
    for (const button of buttons) button.disabled = false;
    bar.hidden = true;
    words.textContent = text;
  };
  refused.replaceChildren();
  for (const button of buttons) button.disabled = true;
  bar.hidden = false;
  bar.value = 0;
  words.textContent = "Uploading";
  request.upload.addEventListener("progress", ({ loaded, total }) => {
    bar.value = total ? loaded / total : 0;
    words.textContent = loaded < total ? `${Math.floor((100 * loaded) / total)} %` : "Checking the files";
  });
  request.addEventListener("load", () => {
    if (request.status === 200 && request.responseURL) {
      end("Taken in"); // who comes back to this page as it was may send another
      location.assign(request.responseURL);
      return;
    }
    end("");
    const problem = request.responseXML?.querySelector(".problem");
    if (!problem) {
      words.textContent = `The service answered with status ${request.status}.`;
      return;
    }
    refused.replaceChildren(document.importNode(problem, true));
    refused.scrollIntoView({ block: "nearest" });
  });
  request.addEventListener("error", () => end(LOST));
  request.open("POST", form.action);
  request.responseType = "document";
  request.send(said);
}

const form = document.getElementById("submission");
if (form) {
  form.addEventListener("submit", (event) => send(form, event));
  form.addEventListener("drop", (event) => {
    over(form, event);
    drop(form, event);
  });
  for (const kind of ["dragover", "dragleave"]) form.addEventListener(kind, (event) => over(form, event));
}
follow();
