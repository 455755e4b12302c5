// A telephone call finds the visit that it came from.
//
//   npx tsx calls.ts SITE
//
// SITE is the public id of your site. The site's tracker usually reports the click on the number; here we do it.

import { randomUUID } from "node:crypto";
import { address, ask, bearer, security } from "./connect.js";
import { CallDirection, CallStatus, MatchMethod, PushedCall } from "./gen/opsmantik/v1/call.js";
import { CallsServiceClient, RecordCallRequest, ReviewCallRequest } from "./gen/opsmantik/v1/calls.js";
import { IngestRequest, IngestServiceClient } from "./gen/opsmantik/v1/ingest.js";
import { GetSessionScoreRequest, ScoringServiceClient } from "./gen/opsmantik/v1/scoring.js";

const site = process.argv[2] ?? "";
const ingest = new IngestServiceClient(address, security, bearer());
const calls = new CallsServiceClient(address, security, bearer());
const scoring = new ScoringServiceClient(address, security, bearer());

// A visitor who came by an ad clicks on the telephone number.
const click = {
  id: randomUUID(), // made once; sent again with every retry
  site,
  url: "https://shop.example/?gclid=Cj0KCQ-example",
  sessionId: "a-visit",
  category: "conversion",
  action: "phone_call",
  label: "tel:+12025550123",
};
const { results } = await ask(ingest, ingest.ingest, IngestRequest.fromPartial({ events: [click] }));
console.log(results[0]?.outcome);

// The telephone rings. Push what is known ...
const call = PushedCall.fromPartial({
  site,
  key: { provider: "example", providerCallId: randomUUID() },
  direction: CallDirection.CALL_DIRECTION_INBOUND,
  dialledNumber: "+12025550123",
  callerNumber: "+12025550187", // hashed before it is stored
  status: CallStatus.CALL_STATUS_RINGING,
  startedAt: new Date(),
});
await ask(calls, calls.recordCall, RecordCallRequest.fromPartial({ call }));

// ... and again whenever there is news: it stays one call.
call.status = CallStatus.CALL_STATUS_COMPLETED;
call.duration = { $case: "durationText", value: "3:12" };
const { recorded } = await ask(calls, calls.recordCall, RecordCallRequest.fromPartial({ call }));
const stored = recorded?.call;
const session = stored?.match?.session;
console.log(MatchMethod[stored?.match?.method ?? 0], "session", session?.sessionId);

// Why the visit is a good lead: an event or a call behind each signal.
if (session) {
  const answer = await ask(scoring, scoring.getSessionScore, GetSessionScoreRequest.fromPartial({ session }));
  console.log("score", answer.score?.value);
  console.dir(answer.evidence, { depth: null });
}

// It was a sale.
const saleAmount = { currencyCode: "USD", units: 120, nanos: 500_000_000 };
const review = ReviewCallRequest.fromPartial({
  site,
  callId: stored?.id ?? "",
  decision: { $case: "confirm", value: { saleAmount } },
});
console.log((await ask(calls, calls.reviewCall, review)).call?.review);
