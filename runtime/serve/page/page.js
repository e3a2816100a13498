// The page of `vl2 serve`: a conversation over /v1/chat/completions. Nothing is kept beyond this tab.

const $ = (id) => document.getElementById(id);
const log = $("log"), tray = $("tray"), question = $("question"), statusLine = $("status");
const TOKEN = "vl2-token", SVG = "http://www.w3.org/2000/svg";
// Told apart from each other on light and dark pictures, and by the most common colour blindnesses.
const COLOURS = ["#ff4d4d", "#33bbff", "#ffcc00", "#66dd66", "#ff66ff", "#ff9933"];

const newConversation = () => ({
  messages: [], // as the API takes them
  images: [], // all of them in order: { name, url, file }
});
let conversation = newConversation();
let pending = []; // images of the next question
let running = null; // the AbortController of the answer that comes in

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function drawing(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

function say(text) {
  statusLine.textContent = text;
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// --- images of the next question

async function addImages(files) {
  const images = [...files].filter((file) => file.type.startsWith("image/"));
  if (files.length && !images.length) complain(`${files[0].name || "what was given"} is not an image`);
  else if (images.length) complain("");
  for (const file of await Promise.all(images.map(upright))) {
    pending.push({ file, name: file.name || "pasted image", url: URL.createObjectURL(file) });
  }
  showTray();
}

/** The file, or where its camera was not held upright a turned copy: the model sees pixels only, not how to hold them. */
async function upright(file) {
  try {
    if (orientation(new DataView(await file.slice(0, 1 << 17).arrayBuffer())) === 1) return file;
    const turned = await createImageBitmap(file, { imageOrientation: "from-image" });
    const canvas = element("canvas", { width: turned.width, height: turned.height });
    canvas.getContext("2d").drawImage(turned, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
    if (!blob) return file; // larger than this browser can draw
    say(`${file.name} was turned upright, as its camera says.`);
    return new File([blob], file.name, { type: "image/jpeg" });
  } catch {
    return file; // as it is; the server says what is wrong with it, if anything is
  }
}

/** The orientation, 1 to 8, in the Exif data of a JPEG's beginning; 1 where there is none. */
function orientation(view) {
  if (view.getUint16(0) !== 0xffd8) return 1;
  for (let at = 2; at + 10 < view.byteLength && view.getUint8(at) === 0xff; at += 2 + view.getUint16(at + 2)) {
    if (view.getUint16(at) !== 0xffe1 || view.getUint32(at + 4) !== 0x45786966) continue;
    const tiff = at + 10, little = view.getUint16(tiff) === 0x4949, table = tiff + view.getUint32(tiff + 4, little);
    for (let entry = 0; entry < view.getUint16(table, little); entry++) {
      const field = table + 2 + 12 * entry;
      if (view.getUint16(field, little) === 0x0112) return view.getUint16(field + 8, little);
    }
  }
  return 1;
}

function showTray() {
  tray.replaceChildren(...pending.map((image) => {
    const remove = element("button", { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Remove ${image.name}`);
    remove.addEventListener("click", () => {
      pending = pending.filter((other) => other !== image);
      URL.revokeObjectURL(image.url);
      showTray();
      question.focus();
    });
    return element("li", {}, element("img", { src: image.url, alt: image.name }), remove);
  }));
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
}

// --- talking to the server

function headers() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { Authorization: `Bearer ${token}` } : {};
}

function wantToken(wanted) {
  $("token-form").hidden = !wanted;
  if (wanted) $("token").focus();
}

async function greet() {
  try {
    const health = await (await fetch("/health")).json();
    $("model").textContent = [health.model, health.backend].filter(Boolean).join(" · ");
    const models = await fetch("/v1/models", { headers: headers() });
    wantToken(models.status === 401);
    if (models.status === 401 && sessionStorage.getItem(TOKEN)) complain("the server does not know this token");
  } catch {
    complain("the server does not answer");
  }
}

/** The server's own words about a refusal; Retry-After where it gives one. */
async function refusal(response) {
  let text = `the server answered ${response.status} ${response.statusText}`;
  try {
    text = (await response.json()).error.message;
  } catch { /* no JSON: the status has to do */ }
  if (response.status === 401) wantToken(true);
  const wait = response.headers.get("Retry-After");
  return new Error(wait ? `${text}; try again in ${wait} s` : text);
}

/** The events of a server-sent stream, parsed, up to [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off: the server ended the connection");
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      yield JSON.parse(event.slice(6));
    }
  }
}

async function post(body, signal) {
  let response;
  try {
    const sent = { ...headers(), "Content-Type": "application/json" };
    response = await fetch("/v1/chat/completions", { method: "POST", headers: sent, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // A server that refuses a large body may close the connection before all of it was sent.
    throw body.size > 1e6 ? tooLarge(body.size, "the connection broke while it was sent") : new Error("the server cannot be reached");
  }
  if (response.status === 413) throw tooLarge(body.size, (await refusal(response)).message);
  if (!response.ok) throw await refusal(response);
  return response;
}

function tooLarge(size, reason) {
  return new Error(`the conversation with its images is ${megabytes(size)} large: ${reason}. ` +
    "Give a smaller image, or begin a new chat.");
}

// --- a question and its answer

async function ask() {
  const text = question.value.trim();
  if (running || !text) return question.focus();
  complain("");
  running = new AbortController();
  const here = conversation, images = pending, turn = showQuestion(text, images), answer = showAnswer();
  question.value = "";
  pending = [];
  showTray();
  busy(true);
  try {
    const parts = await Promise.all(images.map(async (image) =>
      ({ type: "image_url", image_url: { url: await dataUrl(image.file) } })));
    const asked = { role: "user", content: [...parts, { type: "text", text }] };
    await receive([...here.messages, asked], answer);
    here.messages.push(asked, { role: "assistant", content: answer.text });
    here.images.push(...images);
    finish(answer, here.images.at(-1));
  } catch (error) {
    if (here !== conversation) return; // a new chat was begun
    if (error.name !== "AbortError") complain(`Not answered: ${error.message}`);
    // Nothing typed or picked is lost.
    turn.remove();
    answer.article.remove();
    question.value = question.value || text;
    pending = [...images, ...pending];
    showTray();
    say(error.name === "AbortError" ? "Stopped." : "");
  } finally {
    running = null;
    busy(false);
  }
}

function showQuestion(text, images) {
  $("hint").hidden = true;
  const pictures = images.map((image) => element("img", { src: image.url, alt: image.name }));
  const article = element("article", { className: "user" }, element("div", { className: "thumbnails" }, ...pictures),
    element("div", { className: "text", textContent: text }));
  log.append(article);
  return article;
}

function showAnswer() {
  const body = element("div", { className: "text" }), article = element("article", { className: "assistant" }, body);
  // Read out once it is whole, not piece by piece.
  article.setAttribute("aria-busy", "true");
  log.append(article);
  log.scrollTop = log.scrollHeight;
  return { article, body, text: "", ending: null, usage: null, timings: null, begun: performance.now(), first: null };
}

/** Fills `answer` as it comes. An answer that was stopped keeps what had come; without any text that is an error. */
async function receive(messages, answer) {
  const asked = JSON.stringify({ messages, stream: true, stream_options: { include_usage: true } });
  try {
    const response = await post(new Blob([asked]), running.signal);
    for await (const event of events(response)) take(event, answer);
  } catch (error) {
    if (error.name !== "AbortError" || !answer.text) throw error;
    answer.ending = { finish_reason: "stopped" };
  }
}

function take(event, answer) {
  if (event.error) throw new Error(event.error.message);
  answer.usage = event.usage ?? answer.usage;
  answer.timings = event.timings ?? answer.timings;
  const choice = event.choices?.[0];
  if (!choice) return;
  if (choice.finish_reason) answer.ending = choice;
  if (!choice.delta?.content) return;
  answer.first ??= performance.now() - answer.begun;
  answer.text += choice.delta.content;
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  answer.body.textContent = readable(answer.text);
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/** Without grounding marks: labels stay, boxes are drawn instead. */
function readable(text) {
  return text.replace(/<\|det\|>[^]*?(<\|\/det\|>|$)/g, "").replace(/<\|\/?(ref|grounding)\|>/g, "");
}

/** image: the last one of the conversation, to which boxes refer. */
function finish(answer, image) {
  const { article, body, ending, usage, timings, first } = answer;
  body.textContent = readable(answer.text) || (answer.text ? "" : "(an empty answer)");
  if (ending?.boxes?.length && image) article.append(...drawBoxes(image, ending.boxes, ending.image_size));
  const notes = [...(ending?.box_problems ?? []), ending?.loop].filter(Boolean);
  const facts = [
    usage && `${usage.completion_tokens} tokens`,
    timings?.tokens_per_second && `${timings.tokens_per_second.toFixed(1)} tokens/s`,
    first !== null && `first after ${(first / 1000).toFixed(1)} s`,
    timings?.peak_rss_bytes && `memory ${megabytes(timings.peak_rss_bytes)}`,
    ending?.finish_reason === "length" && !ending.loop && "cut at the limit of tokens",
    ending?.finish_reason === "stopped" && "stopped",
    ...notes,
  ].filter(Boolean).join(" · ");
  article.append(element("div", { className: "facts", textContent: facts }));
  article.removeAttribute("aria-busy");
  log.scrollTop = log.scrollHeight;
  say(ending?.finish_reason === "stopped" ? "Stopped." : "");
}

/** The image with its boxes as a figure, and the boxes as a list for those who do not see it. */
function drawBoxes(image, boxes, [width, height]) {
  const overlay = drawing("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const labels = boxes.map(({ label, pixels: [x1, y1, x2, y2] }, index) => {
    const colour = COLOURS[index % COLOURS.length], left = Math.min(x1, x2), top = Math.min(y1, y2);
    overlay.append(
      drawing("rect", { x: left, y: top, width: Math.abs(x2 - x1), height: Math.abs(y2 - y1), stroke: colour }));
    const text = element("span", { className: "label", textContent: label });
    text.setAttribute("aria-hidden", "true");
    Object.assign(text.style, { left: `${100 * left / width}%`, top: `${100 * top / height}%`, background: colour });
    // Above its box, or inside where there is no room.
    text.classList.toggle("above", top > height / 10);
    return text;
  });
  const picture = element("img", { src: image.url, alt: `${image.name} with ${boxes.length} boxes` });
  const rows = boxes.map(({ label, pixels: [x1, y1, x2, y2] }) =>
    element("li", { textContent: `${label}: from (${x1}, ${y1}) to (${x2}, ${y2}) pixels` }));
  return [element("figure", {}, picture, overlay, ...labels), element("ul", { className: "boxes" }, ...rows)];
}

let clock = null;

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  clearInterval(clock);
  if (!is) return question.focus();
  const begun = Date.now();
  say("Answering.");
  clock = setInterval(() => say(`Answering, ${Math.round((Date.now() - begun) / 1000)} s.`), 5000);
}

function newChat() {
  running?.abort();
  for (const image of [...conversation.images, ...pending]) URL.revokeObjectURL(image.url);
  conversation = newConversation();
  pending = [];
  log.replaceChildren($("hint"));
  $("hint").hidden = false;
  showTray();
  complain("");
  say("");
  question.value = "";
  question.focus();
}

// --- what the user does

$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("stop").addEventListener("click", () => running?.abort());
$("new-chat").addEventListener("click", newChat);
$("file").addEventListener("change", (event) => { addImages(event.target.files); event.target.value = ""; });
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) { event.preventDefault(); addImages(event.clipboardData.files); }
});
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  addImages(event.dataTransfer.files);
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value.trim());
  $("token").value = "";
  complain("");
  greet();
});
greet();
question.focus();
