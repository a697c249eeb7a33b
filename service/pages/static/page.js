// What the pages can do without and are nicer with: parts that keep themselves up to date, files dropped, an upload
// that shows how far it is. Everything is rendered by the server; here its parts are only exchanged.
"use strict";

const GENTLY = 700; // milliseconds between two looks, however often something happens

// Parts marked data-live are fetched again: after every event of data-events, else every data-every seconds. When what
// they tell of has ended, they come without those marks.

let looking = null;

async function look() {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (answer.status === 404 || answer.redirected) {
    location.reload(); // deleted, or signed out: the server says what there is instead
    return;
  }
  if (!answer.ok) return; // later
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  document.title = fresh.title;
  for (const part of document.querySelectorAll("[data-live]")) exchange(part, fresh.getElementById(part.id));
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
    try {
      if (!document.hidden) await look();
    } catch {
      // the service is away; the next look may find it
    }
    looking = null;
  }, after);
}

function keepLooking() {
  const part = document.querySelector("[data-every]");
  if (part === null) return; // it has ended
  setTimeout(() => {
    lookSoon(0);
    keepLooking();
  }, 1000 * part.dataset.every);
}

function follow() {
  const part = document.querySelector("[data-every]");
  if (part === null) return;
  document.addEventListener("visibilitychange", () => document.hidden || lookSoon(0));
  if (!part.dataset.events) {
    keepLooking();
    return;
  }
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
  const put_in = [];
  for (const file of files) {
    const kind = KINDS.find(([, pattern]) => pattern.test(file.name));
    const name = field && files.length === 1 ? field.dataset.drop : kind && kind[0];
    if (form.elements[name]?.type !== "file") continue; // of an earlier job, or of no kind that is known
    put(form.elements[name], file);
    put_in.push(`${file.name} as ${name}`);
  }
  document.getElementById("said").textContent = put_in.join(", ") || "No file that is known here.";
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
