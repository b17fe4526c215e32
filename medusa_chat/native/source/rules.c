/* Rules of acceptance: greedy with penalties, exact, typical. See rules.h. */
#include "rules.h"

#include <math.h>
#include <string.h>

#include "dispatch.h"
#include "noise.h"
#include "operations.h"
#include "rule_rows.h"
#include "step.h"

MC_DECLARE_VARIANTS(mc_rule_rows, mc_rule_kernels);

static const mc_rule_rows *const variants[] = MC_VARIANTS(mc_rule_kernels);

/* Far more than float32 sums and logarithms of either side are off by. */
#define SHARE_OFF 1e-3
#define LOG_OFF 1e-3
#define UNCERTAIN (-1)

const mc_rule_rows *mc_rule_rows_here(void) { return variants[mc_variant_index()]; }

int32_t mc_rule_size(void) { return sizeof(mc_rule); }

/* The scores of the row that was looked at last, and what is known of them. */
typedef struct {
    const mc_rule *rule;
    const mc_rule_rows *kernels;
    const mc_operations *operations;
    int32_t depth[MC_MOST_ROWS];
    int row;
    float top;      /* the highest score */
    int top_token;  /* the first that has it */
    double log_sum; /* of e^score */
    float kept;     /* scores from here on are kept for sure */
    float lost;     /* scores below are not */
    float least;    /* the lowest score that top-k leaves, -inf without */
    double left;    /* the share of the distribution that top-k leaves */
} view;

static void penalize(view *v, const float *logits, int row) {
    const mc_rule *r = v->rule;
    const float *prompt = r->counts, *reply = r->counts + r->vocabulary;
    v->kernels->penalize(logits, prompt, reply, r->vocabulary, r->repetition, r->presence,
                         r->frequency, r->scores);
    for (int node = row;; node = r->parents[node]) {
        int32_t token = r->tokens[node];
        float one = 1.0f, replied = reply[token];
        for (int other = row;; other = r->parents[other]) {
            replied += r->tokens[other] == token;
            if (!other) break;
        }
        v->kernels->penalize(logits + token, &one, &replied, 1, r->repetition, r->presence,
                             r->frequency, r->scores + token);
        if (!node) return;
    }
}

/* Looks at a row. 0 where its scores are no finite numbers. */
static int look(view *v, int row) {
    const mc_rule *r = v->rule;
    const float *logits = r->logits + (size_t)row * (size_t)r->vocabulary;
    v->row = row;
    if (r->counts) penalize(v, logits, row);
    else memcpy(r->scores, logits, (size_t)r->vocabulary * sizeof *logits);
    if (r->kind != MC_GREEDY) v->kernels->temper(r->scores, r->vocabulary, r->temperature);
    if (!v->kernels->finite(r->scores, r->vocabulary)) return 0;
    v->top = v->operations->largest(r->scores, r->vocabulary);
    v->top_token = 0;
    while (r->scores[v->top_token] != v->top) v->top_token++;
    v->kept = v->lost = v->least = -INFINITY;
    v->left = 1;
    return 1;
}

static double share_above(const view *v, float cut) {
    double sum, weighted;
    v->kernels->sums(v->rule->scores, v->rule->vocabulary, v->top, cut, &sum, &weighted);
    return sum / exp(v->log_sum - v->top);
}

static void find_log_sum(view *v) {
    double sum, weighted;
    v->kernels->sums(v->rule->scores, v->rule->vocabulary, v->top, -INFINITY, &sum, &weighted);
    v->log_sum = v->top + log(sum);
}

/* The k-th highest score. */
static float kth(const view *v, int k) {
    float value[MC_MOST_KEPT];
    int size = v->rule->vocabulary;
    for (int i = 0; i < k; i++) value[i] = -INFINITY;
    for (int first = 0; first < size; first++) {
        const float *rest = v->rule->scores + first;
        first += v->operations->first_above(rest, size - first, value[k - 1]);
        if (first == size) break;
        float x = v->rule->scores[first];
        int place = k - 1;
        for (; place > 0 && value[place - 1] < x; place--) value[place] = value[place - 1];
        value[place] = x;
    }
    return value[k - 1];
}

/* Prepares truncation. 0 where no decision would be certain. */
static int truncate_row(view *v) {
    const mc_rule *r = v->rule;
    if (r->min_p > 0) {
        if (r->min_p < 1e-20) return 0;
        v->kept = v->top + (float)(log(r->min_p) + LOG_OFF);
        v->lost = v->top + (float)(log(r->min_p) - LOG_OFF);
    }
    if (r->top_k > 0 && r->top_k < r->vocabulary) {
        if (r->top_k > MC_MOST_KEPT) return 0;
        v->least = kth(v, r->top_k);
    }
    if (r->top_p >= 1) return 1;
    find_log_sum(v);
    if (v->least > -INFINITY) v->left = share_above(v, nextafterf(v->least, -INFINITY));
    return 1;
}

/* 1 if a token is kept by truncation or threshold, 0 if not, UNCERTAIN between. */
static int is_kept(const view *v, float score) {
    if (score < v->least) return 0;
    int at_top = score == v->top, known = at_top || score >= v->kept ? 1 : UNCERTAIN;
    /* A probability that float32 does not tell from the highest one is kept too. */
    if (!at_top && score < v->lost) return score > v->top - 1e-5f ? UNCERTAIN : 0;
    if (v->rule->kind != MC_EXACT || v->rule->top_p >= 1) return known;
    double above = share_above(v, score) / v->left;
    double with_equals = share_above(v, nextafterf(score, -INFINITY)) / v->left;
    double own = exp(score - v->log_sum) / v->left;
    if (above > v->rule->top_p + SHARE_OFF) return 0;
    return with_equals - own < v->rule->top_p - SHARE_OFF ? known : UNCERTAIN;
}

static uint32_t row_key(const view *v) {
    return mc_row_key(v->rule->seed, v->rule->position + v->depth[v->row] + 1);
}

/* Draws the token behind the row; UNCERTAIN where two may win. */
static int draw(const view *v) {
    const mc_rule *r = v->rule;
    uint32_t key = row_key(v);
    if (is_kept(v, v->top) != 1) return UNCERTAIN;
    int token = v->top_token;
    double best = v->top + mc_gumbel(mc_uniform(r->token_keys[token], key)), rival = -INFINITY;
    double scale = fabs(v->top) + 25, off = 2e-5 + 4e-7 * scale;
    for (int i = 0; i < r->vocabulary; i++) {
        i = v->kernels->next_hit(r->scores, r->token_keys, key, i, r->vocabulary,
                                 (float)(best - 2 * off));
        if (i == r->vocabulary) break;
        double value = r->scores[i] + mc_gumbel(mc_uniform(r->token_keys[i], key));
        if (i == v->top_token || value < best - off) continue;
        int kept = is_kept(v, r->scores[i]);
        if (!kept) continue;
        if (kept == UNCERTAIN || value <= best) {
            rival = value > rival ? value : rival;
            continue;
        }
        rival = best > rival ? best : rival;
        best = value;
        token = i;
    }
    return rival > best - off ? UNCERTAIN : token;
}

/* The token that greedy or exact decoding chooses behind a row, or UNCERTAIN. */
static int chosen_behind(view *v, int row) {
    if (!look(v, row)) return UNCERTAIN;
    if (v->rule->kind == MC_GREEDY) return v->top_token;
    return truncate_row(v) ? draw(v) : UNCERTAIN;
}

/* Keeps a child that is the token chosen behind its parent. */
static int match(view *v, mc_rule *r) {
    int32_t chosen[MC_MOST_ROWS];
    uint8_t alive[MC_MOST_ROWS] = {1}, known[MC_MOST_ROWS] = {0};
    r->row = 0;
    for (int row = 1; row < r->rows; row++) {
        int parent = r->parents[row];
        alive[row] = 0;
        if (!alive[parent]) continue;
        if (!known[parent]) {
            chosen[parent] = chosen_behind(v, parent);
            known[parent] = 1;
            if (chosen[parent] == UNCERTAIN) return 0;
        }
        alive[row] = chosen[parent] == r->tokens[row];
        if (alive[row] && v->depth[row] > v->depth[r->row]) r->row = row;
    }
    r->next = known[r->row] ? chosen[r->row] : chosen_behind(v, r->row);
    return r->next != UNCERTAIN;
}

/* Prepares typical acceptance (paper, section 2.3.1): p > min(epsilon, delta * exp(-entropy)). */
static int threshold_row(view *v, int row) {
    double sum, weighted;
    if (!look(v, row)) return 0;
    v->kernels->sums(v->rule->scores, v->rule->vocabulary, v->top, -INFINITY, &sum, &weighted);
    v->log_sum = v->top + log(sum);
    double entropy = log(sum) - weighted / sum;
    double bound = fmin(log(v->rule->epsilon), log(v->rule->delta) - entropy) + v->log_sum;
    v->kept = (float)(bound + LOG_OFF);
    v->lost = (float)(bound - LOG_OFF);
    return 1;
}

/* The deepest kept row; of equally deep ones the likeliest. */
static int typical(view *v, mc_rule *r) {
    double likelihood[MC_MOST_ROWS] = {0}, rival = -INFINITY;
    uint8_t alive[MC_MOST_ROWS] = {1};
    r->row = 0;
    for (int parent = 0; parent < r->rows; parent++) {
        int looked = 0;
        for (int row = parent + 1; alive[parent] && row < r->rows; row++) {
            if (r->parents[row] != parent) continue;
            if (!looked && !threshold_row(v, parent)) return 0;
            looked = 1;
            float score = r->scores[r->tokens[row]];
            if (score >= v->lost && score < v->kept) return 0;
            alive[row] = score >= v->kept;
            likelihood[row] = likelihood[parent] + score - v->log_sum;
        }
    }
    for (int row = 1; row < r->rows; row++) {
        int deeper = v->depth[row] - v->depth[r->row];
        if (!alive[row] || deeper < 0) continue;
        double gain = likelihood[row] - likelihood[r->row];
        if (deeper > 0) rival = -INFINITY;
        else rival = fmax(rival, gain > 0 ? likelihood[r->row] : likelihood[row]);
        if (deeper > 0 || gain > 0) r->row = row;
    }
    if (rival > likelihood[r->row] - LOG_OFF || !threshold_row(v, r->row)) return 0;
    r->next = draw(v);
    return r->next != UNCERTAIN;
}

int mc_decide(mc_rule *rule) {
    view v = {.rule = rule, .kernels = mc_rule_rows_here(), .operations = mc_operations_here()};
    if (rule->rows < 1 || rule->rows > MC_MOST_ROWS || rule->vocabulary < 1) return -1;
    for (int row = 0; row < rule->rows; row++) {
        int parent = row ? rule->parents[row] : 0;
        if (parent < 0 || parent > row || (row && parent == row)) return -1;
        if (rule->tokens[row] < 0 || rule->tokens[row] >= rule->vocabulary) return -1;
        v.depth[row] = row ? v.depth[parent] + 1 : 0;
    }
    return rule->kind == MC_TYPICAL ? typical(&v, rule) : match(&v, rule);
}
