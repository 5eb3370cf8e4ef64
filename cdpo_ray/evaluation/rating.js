// Show the pair that the server names, and send what the voter chooses; the next pair is the answer.
const KEYS = { 1: "left", 2: "right", 3: "tie", u: "undo" };
const PIXELATED_BELOW = 128;
const part = (id) => document.getElementById(id);
let pair = null; // id of the pair on the page; null: wait

function complain(text) {
  part("fault").textContent = text;
  part("fault").hidden = text === "";
}

async function request(address, options) {
  try {
    const answer = await fetch(address, options);
    if (!answer.ok) throw new Error(answer.statusText);
    await show(await answer.json());
  } catch {
    complain("The last choice was not saved: cdpo rate does not answer. Start it again; it continues where you stopped.");
  }
}

async function show(state) {
  const isDone = state.pair === "" && state.fault === "";
  complain(state.fault);
  part("rating").hidden = state.pair === "";
  part("done").hidden = !isDone;
  part("progress").max = state.total;
  part("progress").value = state.rated;
  part("count").textContent = `${state.rated} of ${state.total} pairs rated`;
  if (state.pair !== "") {
    part("prompt").textContent = state.prompt;
    await Promise.all(["left", "right"].map((side) => load(part(side), state[side])));
  }
  pair = state.pair;
  part("pair").classList.remove("waiting");
  enable(pair !== "", state.rated > 0);
}

function enable(canChoose, canUndo) {
  for (const choice of ["left", "right", "tie"]) part(`choose-${choice}`).disabled = !canChoose;
  part("undo").disabled = !canUndo;
}

async function load(image, id) {
  image.src = `image/${id}`;
  await image.decode();
  image.classList.toggle("pixelated", image.naturalWidth < PIXELATED_BELOW);
}

function choose(choice) {
  const shown = pair;
  if (shown === null || (shown === "" && choice !== "undo")) return;
  pair = null;
  part("pair").classList.add("waiting");
  enable(false, false);
  const body = JSON.stringify({ pair: shown, choice });
  request("vote", { method: "POST", headers: { "Content-Type": "application/json" }, body });
}

for (const side of ["left", "right"]) part(side).addEventListener("click", () => choose(side));
for (const side of ["left", "right", "tie"]) part(`choose-${side}`).addEventListener("click", () => choose(side));
part("undo").addEventListener("click", () => choose("undo"));
addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const choice = KEYS[event.key.toLowerCase()];
  if (choice) choose(choice);
});
request("pair");
