// Follows a line in JavaScript: prints every event once and in order, healing what it missed from the log.
//
//     npm install zeromq@6
//     node examples/follow.mjs tcp://127.0.0.1:5551 tcp://127.0.0.1:5552 [COUNT]
//
// Prints `LOG_SEQUENCE JSON` lines from the log's beginning on; ends after COUNT of them. The publisher is only the
// hint that there is something new: whatever comes, the log is asked for what follows the last event printed.

import { createRequire } from "node:module";

// From the folder where it is started, so that this file may lie anywhere.
const { Dealer, Subscriber } = createRequire(`${process.cwd()}/`)("zeromq");

const [eventsAddress, replayAddress, count] = process.argv.slice(2);
if (!replayAddress) {
  console.error("usage: follow.mjs EVENTS_ADDRESS REPLAY_ADDRESS [COUNT]");
  process.exit(2);
}
let wanted = count === undefined ? Infinity : Number(count);
let epoch = 0; // below 2^53: a number holds it exactly
let sequence = 0;
let token = 0;

const events = new Subscriber({ receiveHighWaterMark: 256, linger: 0 });
events.connect(eventsAddress);
events.subscribe("event/", "head/");
events.receiveTimeout = 1000;
const replay = new Dealer({ immediate: true, linger: 0, sendTimeout: 2000, receiveTimeout: 2000 });
replay.connect(replayAddress);

// Ask for what follows and print it; whether there may be more.
async function catchUp() {
  token += 1;
  const request = { type: "replay", version: 1, token, log_epoch: epoch, log_sequence: sequence };
  await replay.send(JSON.stringify(request));
  const [first, ...parts] = await replay.receive();
  const header = JSON.parse(first.toString());
  if (header.type !== "events" || header.token !== token) return true; // of an earlier question, or a refusal
  if (header.log_epoch !== epoch) [epoch, sequence] = [header.log_epoch, 0]; // another log: from its beginning
  if (header.gap) {
    console.error(`${header.gap.first} to ${header.gap.last} are not kept any more`);
    sequence = header.gap.last;
  }
  for (let at = 0; at < parts.length && wanted > 0; at += 2, wanted -= 1) {
    const text = parts[at].toString(); // parts[at + 1] is the mask: a PNG of 1 bit per pixel, or empty
    sequence = JSON.parse(text).log_sequence;
    console.log(`${sequence} ${text}`);
  }
  return sequence < header.head;
}

let behind = true;
while (wanted > 0) {
  try {
    behind = behind ? await catchUp() : (await events.receive(), true);
  } catch (error) {
    if (error.code !== "EAGAIN") throw error; // nobody there, or nothing new, within the time; ask again
    behind = true;
  }
}
events.close();
replay.close();
