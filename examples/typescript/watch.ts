// Watches the events, sessions or calls of a site, and goes on where it was, whatever happens in between.
//
//   npx tsx watch.ts SITE [events|sessions|calls] [TOKEN_FILE]
//
// Prints each change as a line of JSON. The resume token is kept in TOKEN_FILE, so that this program, started again, is
// told what it missed. After a crash the last change may be told once more: apply changes by the row's key. If you keep
// a copy of the rows, store the token in the same transaction as the row.

import { existsSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { type ClientReadableStream, type ServiceError, status } from "@grpc/grpc-js";
import { address, bearer, security } from "./connect.js";
import { CallsServiceClient, type WatchCallsResponse } from "./gen/opsmantik/v1/calls.js";
import { IngestServiceClient, type WatchEventsResponse } from "./gen/opsmantik/v1/ingest.js";
import { ScoringServiceClient, type WatchSessionsResponse } from "./gen/opsmantik/v1/scoring.js";
import { changeKindToJSON } from "./gen/opsmantik/v1/watch.js";

const [site = "", what = "events", file = `${site}-${what}.token`] = process.argv.slice(2);

type Message = WatchEventsResponse | WatchSessionsResponse | WatchCallsResponse;
const ingest = new IngestServiceClient(address, security, bearer());
const scoring = new ScoringServiceClient(address, security, bearer());
const calls = new CallsServiceClient(address, security, bearer());
const watches: Record<string, (resumeToken?: string) => ClientReadableStream<Message>> = {
  events: (resumeToken) => ingest.watchEvents({ site, resumeToken }),
  sessions: (resumeToken) => scoring.watchSessions({ site, resumeToken }),
  calls: (resumeToken) => calls.watchCalls({ site, resumeToken }),
};
const watch = watches[what];
if (!watch) throw new Error(`cannot watch ${what}`);

// To try again does not help: somebody has to look.
const final = new Set([
  status.FAILED_PRECONDITION, // the database is not set up for it; the message names the cure
  status.INVALID_ARGUMENT, // the token file belongs to another watch, or is damaged: remove it
  status.NOT_FOUND,
  status.PERMISSION_DENIED,
  status.UNAUTHENTICATED,
  status.UNIMPLEMENTED,
]);
const [shortest, longest] = [500, 30_000]; // milliseconds

const keptToken = () => (existsSync(file) ? readFileSync(file, "utf8") : undefined);

function keepToken(token: string) {
  writeFileSync(`${file}.part`, token);
  renameSync(`${file}.part`, file); // whole or not at all
}

function apply({ payload }: Message) {
  if (payload?.$case === "snapshotStart") {
    console.log('{"kind":"ANEW"}'); // forget all rows that you have: those that are there follow
  } else if (payload?.$case === "change") {
    console.log(JSON.stringify({ ...payload.value, kind: changeKindToJSON(payload.value.kind) }));
  }
}

for (let pause = shortest; ; pause = Math.min(2 * pause, longest)) {
  try {
    for await (const message of watch(keptToken()) as AsyncIterable<Message>) {
      apply(message);
      keepToken(message.resumeToken); // after the change: rather told twice than never
      pause = shortest;
    }
  } catch (error) {
    const { code, details } = error as ServiceError;
    if (code === undefined) throw error; // a mistake of our own
    if (final.has(code)) {
      console.error(`${status[code]}: ${details}`);
      process.exit(1);
    }
    console.error(`${status[code]}: ${details}; trying again`);
  }
  await sleep(pause * (0.5 + Math.random() / 2)); // so that not everybody comes back at once
}
