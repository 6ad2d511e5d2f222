/* Follows a line in C with libzmq 4: prints every event once and in order, healing what it missed from the log.

       cc -O2 -o follow examples/follow.c -lzmq
       ./follow tcp://127.0.0.1:5551 tcp://127.0.0.1:5552 [COUNT]

   Prints `LOG_SEQUENCE JSON` lines from the log's beginning on; ends after COUNT of them. The publisher is only the
   hint that there is something new: whatever comes, the log is asked for what follows the last event printed. */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

static uint64_t epoch, sequence; /* the place in the log: of the last event printed */
static long wanted = -1;

static void die(const char *what) {
    fprintf(stderr, "follow: %s: %s\n", what, zmq_strerror(zmq_errno()));
    exit(1);
}

/* The unsigned number after "key": in the JSON text; enough for headers that the daemon wrote. */
static int number(const char *json, const char *key, uint64_t *value) {
    char quoted[64];
    const char *found;
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    found = strstr(json, quoted);
    return found != NULL && sscanf(found + strlen(quoted), "%" SCNu64, value) == 1;
}

/* One part as text; the caller frees it. */
static char *part(void *socket, int *more) {
    zmq_msg_t message;
    char *text;
    size_t length;
    zmq_msg_init(&message);
    if (zmq_msg_recv(&message, socket, 0) < 0) die("receive");
    length = zmq_msg_size(&message);
    if ((text = malloc(length + 1)) == NULL) exit(1);
    memcpy(text, zmq_msg_data(&message), length);
    text[length] = 0;
    *more = zmq_msg_more(&message);
    zmq_msg_close(&message);
    return text;
}

/* Ask for what follows and print it; whether there may be more. */
static int catch_up(void *replay, uint64_t token) {
    char request[256], *header;
    uint64_t answered, head, now_epoch, count, gap;
    int more, length;
    zmq_pollitem_t item = {replay, 0, ZMQ_POLLIN, 0};

    length = snprintf(request, sizeof request,
        "{\"type\":\"replay\",\"version\":1,\"token\":%" PRIu64 ",\"log_epoch\":%" PRIu64 ",\"log_sequence\":%" PRIu64 "}",
        token, epoch, sequence);
    if (zmq_send(replay, request, (size_t) length, ZMQ_DONTWAIT) < 0) return 1; /* the daemon is away: again later */
    if (zmq_poll(&item, 1, 2000) <= 0) return 1;
    header = part(replay, &more);
    if (!number(header, "token", &answered) || answered != token || !number(header, "log_epoch", &now_epoch)
        || !number(header, "head", &head) || !number(header, "count", &count)) {
        free(header); /* the answer to an earlier question, or a refusal */
        while (more) free(part(replay, &more));
        return 1;
    }
    if (now_epoch != epoch) { epoch = now_epoch; sequence = 0; } /* another log: from its beginning */
    if (number(header, "last", &gap)) { /* {"gap":{"first":..,"last":..}}: retention removed these */
        fprintf(stderr, "follow: %" PRIu64 " to %" PRIu64 " are not kept any more\n", sequence + 1, gap);
        sequence = gap;
    }
    free(header);
    while (more) {
        char *event = part(replay, &more), *mask;
        uint64_t at;
        if (wanted != 0 && number(event, "log_sequence", &at)) {
            printf("%" PRIu64 " %s\n", at, event);
            sequence = at;
            if (wanted > 0) wanted--;
        }
        free(event);
        if (more) { mask = part(replay, &more); free(mask); } /* a PNG of 1 bit per pixel, or empty */
    }
    fflush(stdout);
    return sequence < head;
}

int main(int argc, char **argv) {
    void *context = zmq_ctx_new(), *events = zmq_socket(context, ZMQ_SUB), *replay = zmq_socket(context, ZMQ_DEALER);
    int linger = 0, immediate = 1, behind = 1, more;
    uint64_t token = 0;

    if (argc < 3) { fprintf(stderr, "usage: follow EVENTS_ADDRESS REPLAY_ADDRESS [COUNT]\n"); return 2; }
    if (argc > 3) wanted = atol(argv[3]);
    zmq_setsockopt(events, ZMQ_LINGER, &linger, sizeof linger);
    zmq_setsockopt(replay, ZMQ_LINGER, &linger, sizeof linger);
    zmq_setsockopt(replay, ZMQ_IMMEDIATE, &immediate, sizeof immediate);
    zmq_setsockopt(events, ZMQ_SUBSCRIBE, "event/", 6);
    zmq_setsockopt(events, ZMQ_SUBSCRIBE, "head/", 5);
    if (zmq_connect(events, argv[1]) < 0 || zmq_connect(replay, argv[2]) < 0) die("connect");

    while (wanted != 0) {
        zmq_pollitem_t item = {events, 0, ZMQ_POLLIN, 0};
        if (zmq_poll(&item, 1, behind ? 50 : 1000) > 0) {
            do free(part(events, &more)); while (more);
            behind = 1;
        }
        if (behind) behind = catch_up(replay, ++token);
    }
    zmq_close(events);
    zmq_close(replay);
    zmq_ctx_term(context);
    return 0;
}
